from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raybooth_serving.scale.scaling import BACKLOG_S, FULLNESS, BacklogPolicy, desired_replicas


@pytest.mark.parametrize(
    ("backlogs_s", "fullnesses", "num_replicas", "wanted"),
    [
        ([], [], 1, 1),
        ([0.0], [0.0], 1, 1),
        ([9.0], [1.0], 1, 1),  # full, but within the target
        ([10.5], [1.0], 1, 2),
        ([35.0], [1.0], 1, 4),
        ([20.0, 30.0], [1.0, 1.0], 2, 5),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 3, 1),
        ([1.0, 1.0, 1.0], [0.9, 0.9, 0.9], 3, 3),  # short, but two could not hold the rows
        ([1.0, 1.0, 1.0], [0.5, 0.4, 0.3], 3, 2),
        ([1.0, 1.0], [1.0, 1.0], 2, 2),  # fullness alone brings nobody
        ([8.0, 0.0], [1.0, 0.0], 2, 2),
    ],
)
def test_replicas_that_a_backlog_asks_for(
    backlogs_s: list[float], fullnesses: list[float], num_replicas: int, wanted: int
) -> None:
    assert desired_replicas(backlogs_s, fullnesses, num_replicas, 10.0) == wanted


def context(told: dict[str, dict[str, float]] | None, num_replicas: int = 2) -> Any:
    return SimpleNamespace(
        aggregated_metrics=told, current_num_replicas=num_replicas, target_num_replicas=3
    )


def test_the_policy_reads_what_replicas_tell() -> None:
    policy = BacklogPolicy(target_backlog_s=5.0)
    told = {BACKLOG_S: {"a": 12.0, "b": 6.0}, FULLNESS: {"a": 1.0, "b": 1.0}}
    assert policy(context(told)) == (4, {})
    assert policy(context({})) == (3, {}), "nobody has told anything yet: stay"
    assert policy(context(None)) == (3, {})
