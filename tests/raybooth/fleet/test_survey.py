"""What a base cannot make is told from its shape alone."""

from __future__ import annotations

import pytest

from raybooth.fleet.memory import BaseShape
from raybooth.fleet.survey import size_problems

SD15 = BaseShape({}, 0, (320, 640, 1280, 1280), vae_scale_factor=8, native_resolution=512)
COARSE = BaseShape({}, 0, (64, 128), vae_scale_factor=16, native_resolution=512)


@pytest.mark.parametrize(
    ("side", "shape", "do"),
    [
        (512, SD15, None),
        (64, SD15, None),
        (520, SD15, None),
        (56, SD15, "at least 64"),
        (512, COARSE, None),
        (520, COARSE, "multiple of 16"),
        (16, COARSE, "at least 32"),
    ],
)
def test_sizes_that_a_base_can_make(side: int, shape: BaseShape, do: str | None) -> None:
    problems = size_problems("rex", side, shape)
    assert len(problems) == (do is not None)
    assert all(do in str(problem) and "'rex'" in str(problem) for problem in problems if do)
