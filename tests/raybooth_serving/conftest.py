from __future__ import annotations

from pathlib import Path

import pytest

from raybooth.model.base import Base, load_base
from raybooth.store import Store
from tests.raybooth_serving.published import publish
from tests.tiny import write_tiny_base

SUBJECTS = ("dog-a", "dog-b", "robot-c", "vase-d")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base on disk, called `tiny`."""
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def base(tiny_folder: Path) -> Base:
    return load_base(str(tiny_folder))


@pytest.fixture
def store(tmp_path: Path, base: Base) -> Store:
    """Four subjects of different ranks."""
    store = Store(tmp_path / "home" / "models")
    for seed, subject_id in enumerate(SUBJECTS):
        publish(store, base, subject_id, seed, rank=1 + seed)
    return store
