"""Safetensors files read whole into memory: what is read is what was checked, and it stays.

`safe_open` maps the file instead: its tensors go on living in it, and a file that is truncated, or
whose disk goes away, later kills the process that touches them (SIGBUS).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from raybooth.errors import BaseModelError


@dataclass(frozen=True, eq=False)
class TensorFile:
    """The tensors of a file, and what its header says besides."""

    tensors: Mapping[str, Tensor]
    said: Mapping[str, str]


def read_tensors(path: Path) -> TensorFile:
    """The file at `path`; BaseModelError when it is missing, damaged or of another kind."""
    try:
        content = path.read_bytes()
    except OSError as error:
        found = error.strerror or str(error)
        raise BaseModelError(f"{path} is not a readable safetensors file", found) from error
    return parse_tensors(content, str(path))


def parse_tensors(content: bytes, source: str) -> TensorFile:
    """The file whose bytes are `content`; `source` is what errors call it."""
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise BaseModelError(f"{source} is not a readable safetensors file", str(error)) from error
    return TensorFile(tensors, header.get("__metadata__", {}))
