"""Parts rest where there is a device to leave; on a CPU nothing moves (CUDA: tests/parity)."""

from __future__ import annotations

import pytest
from tests.tiny import write_tiny_base

from raybooth.model.base import Base, load_base
from raybooth.model.resting import awake, rest, wakes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(write_tiny_base(tmp_path_factory.mktemp("resting") / "base")))


def test_on_a_cpu_there_is_nothing_to_leave(base: Base) -> None:
    before = [p.data_ptr() for p in base.vae.parameters()]
    assert rest(base) == 0
    with awake(base):
        assert [p.data_ptr() for p in base.vae.parameters()] == before


def test_what_a_function_gives_and_raises_goes_through(base: Base) -> None:
    @wakes
    def double(base: Base, number: int, *, plus: int = 0) -> int:
        if number < 0:
            raise ValueError("below zero")
        return 2 * number + plus

    assert double(base, 3, plus=1) == 7
    with pytest.raises(ValueError, match="below zero"):
        double(base, -1)
