"""One tiny base for the room."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import write_tiny_base

from raybooth.fleet.task import Folders


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("fleet") / "base")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders.at(tmp_path / "state")
