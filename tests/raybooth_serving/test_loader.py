from __future__ import annotations

import pytest

from raybooth.errors import BaseModelError, StoreError
from raybooth.model.base import Base
from raybooth.store import Store
from raybooth_serving.loader import Loader, adapter_name
from raybooth_serving.metrics import EngineMetrics
from raybooth_serving.orders import Part
from tests.raybooth_serving.published import publish, random_adapter, weights_of


def loader(base: Base, store: Store, max_adapters: int = 8, max_bytes: int = 2**30) -> Loader:
    return Loader(
        store,
        base,
        max_rank=4,
        max_adapters=max_adapters,
        max_bytes=max_bytes,
        metrics=EngineMetrics(),
    )


def test_an_adapter_is_read_once_and_is_what_was_published(base: Base, store: Store) -> None:
    loading = loader(base, store)
    record = store.fetch("dog-b")
    first = loading.load([Part(record)])
    assert loading.load([Part(record)]) is first
    assert (loading.metrics.host_loads, loading.metrics.host_hits) == (1, 1)
    expected = random_adapter(base, 1, rank=2)
    assert first.tensors.keys() == expected.keys()
    for name, pair in expected.items():
        assert (first.tensors[name].down == pair.down).all()
        assert (first.tensors[name].up == pair.up).all()


def test_the_least_recently_used_leaves_memory(base: Base, store: Store) -> None:
    loading = loader(base, store, max_adapters=2)
    for subject in ("dog-a", "dog-b", "dog-a", "robot-c", "dog-a", "dog-b"):
        loading.load([Part(store.fetch(subject))])
    assert (loading.metrics.host_loads, loading.metrics.host_hits) == (4, 2)


def test_what_cannot_be_loaded_says_why(base: Base, store: Store) -> None:
    loading = loader(base, store)
    other = publish(store, base, "other", 9, fingerprint="0" * 64)
    with pytest.raises(BaseModelError, match="trained on another base"):
        loading.load([Part(other)])
    with pytest.raises(BaseModelError, match="rank 5, at most 4"):
        loading.load([Part(publish(store, base, "wide", 9, rank=5))])
    record = store.fetch("dog-a")
    weights_of(store, record).write_bytes(b"")
    with pytest.raises(StoreError, match="damaged"):
        loading.load([Part(record)])
    weights_of(store, record).unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        loading.load([Part(record)])


def test_the_same_number_with_other_content_has_another_name(base: Base, store: Store) -> None:
    before = store.fetch("dog-a")
    store.delete("dog-a")
    after = publish(store, base, "dog-a", 50)
    assert before.reference == after.reference
    assert adapter_name(before) != adapter_name(after)
