"""The matrix of full runs: one answer a cell, and the README's table is its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from raybooth.training.full_matrix import Cell, cells, reason_against, table

README = Path(__file__).parents[3] / "platform" / "README.md"


def test_the_readme_shows_the_matrix_as_it_is() -> None:
    assert table() in README.read_text(encoding="utf-8"), f"put this into {README}:\n{table()}"


def test_every_cell_has_one_answer() -> None:
    assert len(list(cells())) == 4 * 3 * 2 * 3
    supported = [cell for cell in cells() if reason_against(cell, "cpu") is None]
    assert len(supported) == 2 * 2 * (1 + 2 + 2 + 3)
    assert all(cell.optimizer != "paged_adamw8bit" for cell in supported)


@pytest.mark.parametrize(
    ("cell", "cpu", "cuda"),
    [
        (Cell(0, "adamw", True, "none"), None, None),
        (Cell(0, "adamw", False, "optimizer"), "needs zero_stage 1", "needs zero_stage 1"),
        (Cell(2, "adamw8bit", False, "all"), "needs zero_stage 3", "needs zero_stage 3"),
        (Cell(1, "paged_adamw8bit", True, "none"), "unified memory", None),
        (Cell(3, "paged_adamw8bit", True, "all"), "unified memory", "leave the GPU by themselves"),
    ],
)
def test_refusals_name_their_reason(cell: Cell, cpu: str | None, cuda: str | None) -> None:
    for device, expected in (("cpu", cpu), ("cuda", cuda)):
        reason = reason_against(cell, "cuda" if device == "cuda" else "cpu")
        assert (reason is None) == (expected is None)
        assert expected is None or (reason is not None and expected in reason)
