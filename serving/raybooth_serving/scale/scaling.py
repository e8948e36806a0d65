"""How many replicas a backlog of denoise steps asks for: pure decisions.

Ray pickles this module by value into its controller: standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

BACKLOG_S = "backlog_s"
FULLNESS = "fullness"
MAX_FULLNESS = 0.8
"""Replicas go away only while the rows of those that stay are no fuller than this."""


def desired_replicas(
    backlogs_s: Collection[float],
    fullnesses: Collection[float],
    num_replicas: int,
    target_backlog_s: float,
) -> int:
    """Replicas for which the backlog would be `target_backlog_s` each.

    `backlogs_s` are seconds of denoise steps ahead of each replica, `fullnesses` its rows in use
    over its largest bucket. Without rows waiting the backlog is short even at full use, so that
    `fullnesses` decides how many may leave.
    """
    wanted = math.ceil(sum(backlogs_s) / target_backlog_s)
    if wanted < num_replicas:
        wanted = max(wanted, min(num_replicas, math.ceil(sum(fullnesses) / MAX_FULLNESS)))
    return max(1, wanted)


class BacklogPolicy:
    """`desired_replicas` as a policy of Ray Serve, which adds the bounds and the delays."""

    def __init__(self, target_backlog_s: float) -> None:
        self.target_backlog_s = target_backlog_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas wanted, and no state; stays as it is until the replicas have told something."""
        told = context.aggregated_metrics or {}
        backlogs_s = told.get(BACKLOG_S, {}).values()
        if not backlogs_s:
            return context.target_num_replicas, {}
        fullnesses = told.get(FULLNESS, {}).values()
        num_replicas = context.current_num_replicas
        return desired_replicas(backlogs_s, fullnesses, num_replicas, self.target_backlog_s), {}
