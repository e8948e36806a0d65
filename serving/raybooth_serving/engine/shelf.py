"""Values by key in bounded memory: made once however many ask at once, least recently used out.

Any thread may ask. Whoever asks first makes the value, on its own thread; those who ask for the
same key meanwhile wait for it, those who ask for others do not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class ShelfReport:
    """What a shelf holds, and what became of it so far."""

    num_items: int
    size_bytes: int
    hits: int
    """Asked for and there, or just being made for somebody else."""

    makes: int
    """Made, one after the other or not."""

    evictions: int
    """Left because of the bounds (not because they were dropped)."""


class Shelf(Generic[Key, Value]):
    """At most `max_items` values of at most `max_bytes` together; a larger one is not kept."""

    def __init__(self, max_items: int, max_bytes: int, size_of: Callable[[Value], int]) -> None:
        self.max_items = max_items
        self.max_bytes = max_bytes
        self._size_of = size_of
        self._lock = Lock()
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._making: dict[Key, Future[Value]] = {}
        self._size_bytes = self._hits = self._makes = self._evictions = 0

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of `key`, or what `make` returns; what it raises goes to all who wait."""
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
                self._hits += 1
                return found[0]
            future = self._making.get(key)
            is_ours = future is None
            if future is None:
                future = self._making[key] = Future()
            else:
                self._hits += 1
        if is_ours:
            self._make(key, future, make)
        return future.result()

    def drop(self, is_gone: Callable[[Key], bool]) -> None:
        """Forget the values of such keys; one that is being made is given out, but not kept."""
        with self._lock:
            for key in [key for key in self._values if is_gone(key)]:
                self._size_bytes -= self._values.pop(key)[1]
            for key in [key for key in self._making if is_gone(key)]:
                del self._making[key]

    def report(self) -> ShelfReport:
        """The counts now."""
        with self._lock:
            counts = self._hits, self._makes, self._evictions
            return ShelfReport(len(self._values), self._size_bytes, *counts)

    def _make(self, key: Key, future: Future[Value], make: Callable[[], Value]) -> None:
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                self._end(key, future)
            future.set_exception(error)
            raise
        with self._lock:
            self._makes += 1
            if self._end(key, future):
                self._keep(key, value)
        future.set_result(value)

    def _end(self, key: Key, future: Future[Value]) -> bool:
        """Whether the value may be kept: nobody has dropped its key since."""
        is_wanted = self._making.get(key) is future
        if is_wanted:
            del self._making[key]
        return is_wanted

    def _keep(self, key: Key, value: Value) -> None:
        size = self._size_of(value)
        if size > self.max_bytes:
            return
        self._values[key] = value, size
        self._size_bytes += size
        while len(self._values) > self.max_items or self._size_bytes > self.max_bytes:
            self._size_bytes -= self._values.popitem(last=False)[1][1]
            self._evictions += 1
