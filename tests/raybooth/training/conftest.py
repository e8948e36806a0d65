"""The tiny base in both precisions, made once for the room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.raybooth.training.full_jobs import TWO_WORKERS, worker
from tests.tiny import write_tiny_base

from raybooth.config import merge
from raybooth.model.base import Base, load_base


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def base(tiny_folder: Path) -> Base:
    """float32."""
    return load_base(str(tiny_folder))


@pytest.fixture(scope="session")
def base64(tiny_folder: Path) -> Base:
    """float64."""
    return load_base(str(tiny_folder), dtype=torch.float64)


@pytest.fixture(scope="session")
def velocity64(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """float64, v-prediction, zero terminal SNR."""
    folder = tmp_path_factory.mktemp("base") / "velocity"
    write_tiny_base(folder, prediction_type="v_prediction", zero_snr=True, seed=1)
    return load_base(str(folder), dtype=torch.float64)


@pytest.fixture(scope="session")
def two_workers(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers wrote of their full runs: `out`, and `rank-0`, `rank-1` of watched ones."""
    folder = tmp_path_factory.mktemp("two_workers")
    cells = [merge(cell, {"full": {"num_workers": 2}}) for cell in TWO_WORKERS]
    torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
        worker, (2, str(folder / "meeting"), str(tiny_folder), cells, str(folder)), nprocs=2
    )
    return folder
