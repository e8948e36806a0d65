from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from raybooth.errors import BaseModelError, NotPublishedError, RequestError, StoreError
from raybooth.model.base import Base
from raybooth.store import AdapterRecord, Store
from raybooth_serving.engine.loader import HostAdapter, Loader, adapter_name
from raybooth_serving.engine.orders import Part
from raybooth_serving.errors import StoreAwayError
from raybooth_serving.metrics import EngineMetrics
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


def load(loading: Loader, store: Store, subject: str) -> HostAdapter:
    return loading.load([Part(store.fetch(subject))])


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


def test_bytes_are_bounded_as_well(base: Base, store: Store) -> None:
    loading = loader(base, store)
    sizes = {each: load(loading, store, each).size_bytes for each in ("dog-a", "dog-b", "robot-c")}
    assert sizes["dog-b"] == 2 * sizes["dog-a"] > 0
    assert loading.metrics.host_bytes == sum(sizes.values())
    tight = loader(base, store, max_bytes=sizes["dog-a"] + sizes["robot-c"])
    for subject in ("dog-a", "dog-b", "robot-c"):
        load(tight, store, subject)
    assert (tight.metrics.host_adapters, tight.metrics.host_evictions) == (1, 2)
    assert tight.metrics.host_bytes == sizes["robot-c"]


def test_an_adapter_is_read_once_however_many_ask(base: Base, store: Store) -> None:
    loading, parts = loader(base, store), [Part(store.fetch("vase-d"))]
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: loading.load(parts), range(32)))
    assert len(found) == 1
    assert (loading.metrics.host_loads, loading.metrics.host_hits) == (1, 31)


def test_what_is_held_outlives_its_place_and_the_store(base: Base, store: Store) -> None:
    """An adapter in a slot is found without the store; one that nobody holds is not."""
    loading, parts = loader(base, store, max_adapters=1), [Part(store.fetch("dog-a"))]
    held = loading.load(parts)
    load(loading, store, "dog-b")
    parts_b = [Part(store.fetch("dog-b"))]
    store.root.rename(store.root.with_name("away"))
    assert loading.load(parts) is held
    with pytest.raises(StoreAwayError, match="dog-b@1 is not in memory, and the store"):
        loading.load(parts_b)
    store.root.with_name("away").rename(store.root)
    assert loading.load(parts_b).name == adapter_name(parts_b[0].record)


def test_deleted_between_its_name_and_its_weights(base: Base, store: Store) -> None:
    record = store.fetch("dog-a")
    store.delete("dog-a")
    with pytest.raises(NotPublishedError, match="dog-a@1 has just been deleted"):
        loader(base, store).load([Part(record)])


def test_a_forgotten_subject_is_nowhere(base: Base, store: Store) -> None:
    loading = loader(base, store)
    alone = load(loading, store, "dog-a")
    both = loading.load([Part(store.fetch("dog-b"), 0.5), Part(store.fetch("dog-a"), 0.5)])
    other = load(loading, store, "dog-b")
    loading.forget("dog-a")
    assert load(loading, store, "dog-b") is other
    assert loading.metrics.host_adapters == 1
    assert load(loading, store, "dog-a") is not alone
    assert (
        loading.load([Part(store.fetch("dog-b"), 0.5), Part(store.fetch("dog-a"), 0.5)]) is not both
    )


def test_several_subjects_are_one_adapter(base: Base, store: Store) -> None:
    loading = loader(base, store)
    parts = [Part(store.fetch("dog-a"), 0.8), Part(store.fetch("robot-c"), -0.5)]
    both = loading.load(parts)
    assert loading.load(parts) is both
    assert both.name == "+".join(f"{adapter_name(part.record)}*{part.scale}" for part in parts)
    first, second = random_adapter(base, 0, rank=1), random_adapter(base, 2, rank=3)
    for site, pair in both.tensors.items():
        assert torch.equal(pair.down, torch.cat([first[site].down, second[site].down]))
        ups = [first[site].up * 0.8, second[site].up * -0.5]
        assert torch.equal(pair.up, torch.cat(ups, dim=1))
    assert loading.metrics.host_loads == 2


def test_subjects_that_do_not_go_together_are_refused(base: Base, store: Store) -> None:
    loading, dog, robot = loader(base, store), store.fetch("dog-b"), store.fetch("robot-c")
    assert isinstance(dog, AdapterRecord)
    with pytest.raises(RequestError, match=r"do not fit the bank: found ranks 2 \+ 3 at one site"):
        loading.load([Part(dog), Part(robot)])
    terminal = dog.model_copy(update={"train": {"objective": {"zero_terminal_snr": True}}})
    with pytest.raises(RequestError, match="dog-b@1 and robot-c@1 do not go together"):
        loading.load([Part(terminal), Part(robot)])
