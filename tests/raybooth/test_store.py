"""The store shows whole versions or nothing, names what is wrong, and forgets nothing."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from raybooth.errors import InputError, NotPublishedError, StoreError
from raybooth.store import (
    RECORD,
    WEIGHTS,
    AdapterRecord,
    BaseRecord,
    PhotoRecord,
    Store,
    is_seen,
)


def a_record(subject_id: str = "rex", job_id: str = "rex-1") -> AdapterRecord:
    return AdapterRecord(
        subject_id=subject_id,
        job_id=job_id,
        class_noun="dog",
        identifier="sks",
        instance_prompt="a photo of sks dog",
        class_prompt="a photo of a dog",
        base=BaseRecord(name="pocket", fingerprint="ab" * 32),
        rank=4,
        targets="all",
        num_parameters=10,
        train={},
        photos=(PhotoRecord(name="0.jpg", sha256="cd" * 32),),
        prior=None,
        loss_curve=((1, 0.5), (2, 0.25)),
        num_train_steps=2,
        seconds={"train": 1.0},
        versions={"raybooth": "0.1.0"},
    )


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def test_a_published_version_comes_back_whole(store: Store, weights: Path) -> None:
    published = store.publish(a_record(), {WEIGHTS: weights})
    assert published.version == 1
    assert store.fetch("rex") == published
    assert (store.folder("rex@1") / WEIGHTS).read_bytes() == b"weights"
    assert store.verify("rex@1") == []
    assert store.subjects() == ["rex"]


def test_versions_count_up_and_latest_follows(store: Store, weights: Path) -> None:
    for _ in range(3):
        store.publish(a_record(), {WEIGHTS: weights})
    assert store.versions("rex") == [1, 2, 3]
    assert store.resolve("rex") == store.resolve("rex@latest") == ("rex", 3)
    store.set_alias("rex", "latest", 2)
    store.set_alias("rex", "blessed", 1)
    assert store.resolve("rex") == ("rex", 2)
    assert store.resolve("rex@blessed") == ("rex", 1)
    store.set_alias("rex", "latest", None)
    assert store.resolve("rex") == ("rex", 3)


def test_a_removed_version_takes_its_aliases_along(store: Store, weights: Path) -> None:
    store.publish(a_record(), {WEIGHTS: weights})
    store.publish(a_record(), {WEIGHTS: weights})
    store.set_alias("rex", "blessed", 1)
    with pytest.raises(InputError, match="an alias points at rex@1: found blessed of rex"):
        store.delete("rex@1")
    assert store.delete("rex@1", with_aliases=True) == ["rex@1"]
    assert store.aliases("rex") == {"latest": 2}
    assert store.publish(a_record(), {WEIGHTS: weights}).version == 3
    assert store.delete("rex") == ["rex@2", "rex@3"]
    assert store.subjects() == []


def test_an_unknown_subject_lists_near_names(store: Store, weights: Path) -> None:
    store.publish(a_record(), {WEIGHTS: weights})
    with pytest.raises(NotPublishedError, match="did you mean rex"):
        store.fetch("rexx")
    with pytest.raises(NotPublishedError, match="versions 1"):
        store.fetch("rex@7")
    with pytest.raises(NotPublishedError):
        store.fetch("../rex")


def test_stamps_change_with_all_that_is_in_a_subject(store: Store, weights: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.stamps()
    seen = []
    store.publish(a_record("max"), {WEIGHTS: weights})
    for change in (
        lambda: store.publish(a_record(), {WEIGHTS: weights}),
        lambda: store.publish(a_record(), {WEIGHTS: weights}),
        lambda: store.set_alias("rex", "best", 1),
        lambda: store.publish_preview(a_record(), {WEIGHTS: weights}),
        lambda: store.delete("rex@2"),
    ):
        change()
        seen.append(store.stamps())
        time.sleep(0.02)  # a file system's clock ticks a few times in a hundredth of a second
    assert len({stamps["rex"] for stamps in seen}) == 5
    assert len({stamps["max"] for stamps in seen}) == 1
    assert list(Store(store.root, ["m*"]).stamps()) == ["max"]
    store.delete("rex")
    assert list(store.stamps()) == ["max"]


def test_a_changed_byte_is_found(store: Store, weights: Path) -> None:
    store.publish(a_record(), {WEIGHTS: weights})
    (store.folder("rex") / WEIGHTS).write_bytes(b"weightz")
    assert store.verify("rex") == [f"{WEIGHTS} differs from its checksum"]
    (store.folder("rex") / WEIGHTS).unlink()
    assert store.verify("rex") == [f"{WEIGHTS} is missing"]


def test_another_schema_and_a_damaged_record_are_refused(store: Store, weights: Path) -> None:
    store.publish(a_record(), {WEIGHTS: weights})
    path = store.folder("rex") / RECORD
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "schema_version": 9}))
    with pytest.raises(StoreError, match="schema_version 9, this RayBooth knows 1"):
        store.fetch("rex")
    path.write_text(path.read_text()[:50])
    with pytest.raises(StoreError, match="not readable"):
        store.fetch("rex")


def test_a_failed_publication_leaves_nothing(store: Store, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="could not be published"):
        store.publish(a_record(), {WEIGHTS: weights, "missing": tmp_path / "missing"})
    assert store.subjects() == []
    assert list((store.root / "rex").iterdir()) == []


def test_an_id_that_leaves_the_store_is_refused(store: Store, weights: Path) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        store.publish(a_record("../rex"), {WEIGHTS: weights})
    store.publish(a_record(), {WEIGHTS: weights})
    with pytest.raises(InputError, match="alias"):
        store.set_alias("rex", "7", 1)


def test_a_job_is_found_by_its_id(store: Store, weights: Path) -> None:
    store.publish(a_record(job_id="rex-1"), {WEIGHTS: weights})
    store.publish(a_record(job_id="rex-2"), {WEIGHTS: weights})
    found = store.published_job("rex", "rex-1")
    assert found is not None
    assert found.version == 1
    assert store.published_job("rex", "rex-3") is None
    assert store.published_job("cat", "rex-3") is None


def _publish_many(root: Path, weights: Path) -> None:
    for _ in range(10):
        Store(root).publish(a_record(), {WEIGHTS: weights})


def test_two_processes_never_share_a_version(store: Store, weights: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (store.root, weights)
    processes = [context.Process(target=_publish_many, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert store.versions("rex") == list(range(1, 21))
    assert all(store.verify(f"rex@{version}") == [] for version in store.versions("rex"))


def test_globs_hold_whole_ids() -> None:
    assert is_seen(["dog-*"], "dog-a")
    assert is_seen(["cat", "dog-?"], "dog-a")
    assert is_seen(["*"], "vase")
    assert not is_seen(["dog"], "dog-a")
    assert not is_seen(["og-*"], "dog-a")
    assert not is_seen([], "dog-a")


@pytest.mark.parametrize(
    "reference",
    ["rex", "rex@1", "rex@9", "rex@latest", "rex@best", "rex@preview", "rx", "dog-c", "fido@2"],
)
def test_what_is_not_seen_is_as_if_it_were_not_there(
    tmp_path: Path, weights: Path, reference: str
) -> None:
    whole, without = Store(tmp_path / "whole"), Store(tmp_path / "without")
    for store in (whole, without):
        store.publish(a_record("dog-a"), {WEIGHTS: weights})
        store.publish(a_record("fido"), {WEIGHTS: weights})
    whole.publish(a_record("rex"), {WEIGHTS: weights})
    whole.set_alias("rex", "best", 1)
    whole.publish_preview(a_record("rex", "rex-2"), {WEIGHTS: weights})
    reader = Store(whole.root, ["dog-*", "fido"])

    def ask(store: Store) -> list[str]:
        told = []
        for question in (store.fetch, store.folder, store.versions, store.aliases, store.verify):
            with pytest.raises(NotPublishedError) as error:
                question(reference)
            told.append(str(error.value))
        return told

    assert ask(reader) == ask(without)
    assert reader.subjects() == without.subjects() == ["dog-a", "fido"]
    assert reader.previewed() == without.previewed() == []
    assert reader.fetch("fido").reference == "fido@1"
    assert whole.fetch("rex@best").reference == "rex@1"
