"""The tiny base in both precisions, made once for the room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import write_tiny_base

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
