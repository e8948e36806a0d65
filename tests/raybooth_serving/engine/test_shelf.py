"""Made once however many ask, bounded by count and bytes; a slow value holds up its own askers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from raybooth_serving.engine.shelf import Shelf

WAIT_S = 10.0


def shelf(max_items: int = 8, max_bytes: int = 1000) -> Shelf[str, str]:
    return Shelf(max_items, max_bytes, len)


def value(text: str) -> Callable[[], str]:
    return lambda: text


def refused() -> str:
    raise OSError("away")


def test_the_least_recently_used_leaves_by_count_and_by_bytes() -> None:
    by_count = shelf(max_items=2)
    for key in ("a", "b", "a", "c", "a", "b"):
        by_count.get(key, value(key))
    report = by_count.report()
    assert (report.makes, report.hits, report.evictions, report.num_items) == (4, 2, 2, 2)
    by_bytes = shelf(max_bytes=10)
    for key, size in (("a", 4), ("b", 4), ("c", 4), ("wide", 11)):
        assert by_bytes.get(key, value("x" * size)) == "x" * size
    report = by_bytes.report()
    assert (report.num_items, report.size_bytes, report.evictions) == (2, 8, 1)
    assert by_bytes.get("b", refused) == "xxxx"
    with pytest.raises(OSError, match="away"):
        by_bytes.get("a", refused)


def test_many_ask_and_one_makes_while_others_go_on() -> None:
    held, begun, may_end = shelf(), threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        assert may_end.wait(WAIT_S)
        return "slow"

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(held.get, "slow", slow)
        assert begun.wait(WAIT_S)
        others = [pool.submit(held.get, "slow", refused) for _ in range(5)]
        assert pool.submit(held.get, "quick", value("quick")).result(WAIT_S) == "quick"
        assert not any(other.done() for other in (first, *others))
        may_end.set()
        assert {future.result(WAIT_S) for future in (first, *others)} == {"slow"}
    assert held.report().makes == 2


def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    held, begun, may_end = shelf(), threading.Event(), threading.Event()

    def fail() -> str:
        begun.set()
        assert may_end.wait(WAIT_S)
        raise OSError("away")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(held.get, "a", fail)
        assert begun.wait(WAIT_S)
        second = pool.submit(held.get, "a", value("never"))
        while held.report().hits == 0:
            pass
        may_end.set()
        for future in (first, second):
            with pytest.raises(OSError, match="away"):
                future.result(WAIT_S)
    assert held.get("a", value("again")) == "again"


def test_what_is_dropped_while_it_is_made_is_not_kept() -> None:
    held = shelf()
    held.get("a", value("old"))

    def make() -> str:
        held.drop(lambda key: key in ("a", "b"))
        return "late"

    assert held.get("b", make) == "late"
    assert held.report().num_items == held.report().size_bytes == 0
    assert held.get("b", value("new")) == "new"


def test_counts_are_right_after_a_storm() -> None:
    held, interval = shelf(max_items=3, max_bytes=9), sys.getswitchinterval()

    def storm(seed: int) -> None:
        random = Random(seed)
        for _ in range(300):
            key = random.choice("abcdefg")
            assert held.get(key, value(key * random.randint(1, 4)))[0] == key
            if random.random() < 0.1:
                held.drop(lambda other, key=key: other == key)

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(storm, range(6)))
    finally:
        sys.setswitchinterval(interval)
    report = held.report()
    assert report.hits + report.makes == 1800
    assert report.num_items <= 3
    assert report.size_bytes <= 9
    held.drop(lambda key: True)
    assert held.report().size_bytes == 0
