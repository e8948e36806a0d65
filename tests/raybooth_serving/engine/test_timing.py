from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from raybooth.model.bank import Bank
from raybooth.model.base import Base
from raybooth.model.lora import find_sites
from raybooth_serving.engine.step_profile import StepProfile
from raybooth_serving.engine.timing import calibrate

PIXELS = 64
"""Latent pixels of the tiny base's own size."""


@pytest.fixture
def bank(base: Base) -> Iterator[Bank]:
    sites = find_sites(base.denoiser, "all")
    bank = Bank(base.denoiser, sites=sites, rank=4, num_slots=1, device="cpu")
    yield bank
    bank.detach()


def test_calibration_measures_buckets_until_they_stop_paying(base: Base, bank: Bank) -> None:
    profile = StepProfile((1, 2, 4), max_step_s=60.0)
    calibrate(base, bank, profile)
    one, two = profile.seconds(1, PIXELS), profile.seconds(2, PIXELS)
    assert one is not None
    assert two is not None
    assert 0 < one < 60
    assert 0 < two < 60
    assert profile.row_limit(PIXELS) in (2, 4)


def test_calibration_stops_at_the_seconds_that_a_step_may_take(base: Base, bank: Bank) -> None:
    sizes: list[int] = []
    count: Any = lambda module, args: sizes.append(len(args[0]))  # noqa: E731
    hook = base.denoiser.register_forward_pre_hook(count)
    calibrate(base, bank, StepProfile((1, 2, 4, 8), max_step_s=1e-9))
    hook.remove()
    assert set(sizes) == {1, 2}


def test_calibration_notes_where_memory_runs_out(base: Base, bank: Bank) -> None:
    def small(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("more than two rows")

    profile = StepProfile((2, 4, 8), max_step_s=60.0)
    hook = base.denoiser.register_forward_pre_hook(small)
    calibrate(base, bank, profile)
    hook.remove()
    assert profile.row_limit(PIXELS) == 2
