"""What was read stays as it was, whatever becomes of its file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raybooth.errors import BaseModelError
from raybooth.model.tensor_file import parse_tensors, read_tensors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(50_000.0)}, file, metadata={"token": "<rex>"})
    return file


def test_tensors_outlive_their_file(path: Path) -> None:
    """Mapped into memory they would not: reading past the end of a file is a bus error."""
    file = read_tensors(path)
    os.truncate(path, 100)
    assert torch.equal(file.tensors["a"], torch.arange(50_000.0))
    assert file.said == {"token": "<rex>"}


@pytest.mark.parametrize(
    "content", [b"", b"\x08", b"\x80pickle, not safetensors", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_what_is_no_such_file_is_refused(content: bytes) -> None:
    with pytest.raises(BaseModelError, match="the tokens is not a readable safetensors file"):
        parse_tensors(content, "the tokens")


@pytest.mark.parametrize("at", [4, 60, 1000])
def test_a_truncated_or_missing_file_is_refused(path: Path, at: int) -> None:
    os.truncate(path, at)
    with pytest.raises(BaseModelError, match="not a readable"):
        read_tensors(path)
    path.unlink()
    with pytest.raises(BaseModelError, match="No such file"):
        read_tensors(path)
