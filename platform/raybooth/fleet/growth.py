"""Which nodes an autoscaler should bring for a fleet, and how long to wait for one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raybooth.fleet.planner import Capacity, Resources

NODE_WAIT_S = 1800.0
"""Time that an autoscaler has to bring a node on which a worker fits."""


def bundles(workers: Iterable[Resources]) -> list[dict[str, float]]:
    """One bundle a worker, as `ray.autoscaler.sdk.request_resources` takes them, in a fixed order.

    The request stands for the whole cluster, not for what is to be added: it must name what runs
    already beside what waits, or nodes in use would be counted for those that wait.
    """
    asked = [{"CPU": worker.num_cpus, "GPU": worker.num_gpus} for worker in workers]
    whole = [{name: amount for name, amount in bundle.items() if amount} for bundle in asked]
    return sorted(whole, key=lambda bundle: sorted(bundle.items()), reverse=True)


class Patience:
    """Since when each waiting worker has had no node in the cluster that could ever hold it."""

    def __init__(self, wait_s: float = NODE_WAIT_S) -> None:
        self._wait_s = wait_s
        self._since: dict[str, float] = {}

    def overdue(self, waiting: Mapping[str, Resources], total: Capacity, now: float) -> set[str]:
        """Those that, without a break and for longer than the wait, had no such node."""
        homeless = [name for name, asked in waiting.items() if not total.num_workers(asked)]
        self._since = {name: self._since.get(name, now) for name in homeless}
        return {name for name, since in self._since.items() if now - since > self._wait_s}
