"""One tiny base for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import write_tiny_base

from raybooth.model.base import Base, load_base


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base on disk, 32 pixels a side."""
    return write_tiny_base(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def tiny_base(tiny_folder: Path) -> Base:
    """The same, loaded."""
    return load_base(str(tiny_folder))
