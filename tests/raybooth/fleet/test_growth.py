"""Nodes are asked for as the whole cluster should be, and waited for with a limit."""

from __future__ import annotations

from raybooth.fleet.growth import Patience, bundles
from raybooth.fleet.planner import Capacity, NodeCapacity, Resources

GPU = Resources(num_cpus=4, num_gpus=1)
CPU = Resources(num_cpus=1)
EMPTY = Capacity((NodeCapacity(num_cpus=0),))
"""A head without logical CPUs: what a cluster that starts from zero looks like."""

GROWN = Capacity((NodeCapacity(num_cpus=0), NodeCapacity(num_cpus=8, num_gpus=1)))


def test_one_bundle_for_each_worker() -> None:
    assert bundles([GPU, GPU, CPU]) == [{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}, {"CPU": 1}]


def test_order_of_the_workers_does_not_matter() -> None:
    assert bundles([CPU, GPU]) == bundles([GPU, CPU])


def test_nothing_to_run_asks_for_nothing() -> None:
    assert bundles([]) == []


def test_waits_as_long_as_it_may_and_no_longer() -> None:
    patience = Patience(wait_s=100)
    assert patience.overdue({"pack-1": GPU}, EMPTY, now=0) == set()
    assert patience.overdue({"pack-1": GPU}, EMPTY, now=100) == set()
    assert patience.overdue({"pack-1": GPU, "pack-2": GPU}, EMPTY, now=101) == {"pack-1"}


def test_a_node_that_comes_ends_the_wait() -> None:
    patience = Patience(wait_s=100)
    patience.overdue({"pack-1": GPU}, EMPTY, now=0)
    assert patience.overdue({"pack-1": GPU}, GROWN, now=99) == set()
    assert patience.overdue({"pack-1": GPU}, EMPTY, now=150) == set()
    assert patience.overdue({"pack-1": GPU}, EMPTY, now=251) == {"pack-1"}


def test_a_busy_node_is_a_node() -> None:
    """What fits an idle cluster waits its turn; only what fits nowhere is given up."""
    patience = Patience(wait_s=100)
    waiting = {f"pack-{index}": GPU for index in range(5)}
    patience.overdue(waiting, GROWN, now=0)
    assert patience.overdue(waiting, GROWN, now=10_000) == set()
