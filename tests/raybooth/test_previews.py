"""A preview is one whole model at any moment, and gone when it should be."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tests.raybooth.test_store import a_record

from raybooth.errors import NotPublishedError, StoreError
from raybooth.previews import POINTER
from raybooth.store import RECORD, WEIGHTS, AdapterRecord, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def preview(store: Store, train_step: int, job_id: str = "rex-1") -> AdapterRecord:
    """What `rex` is after `train_step`: its weights say so."""
    weights = store.root.parent / "weights"
    weights.write_bytes(f"weights {train_step}".encode())
    record = a_record(job_id=job_id).model_copy(update={"num_train_steps": train_step})
    return store.publish_preview(record, {WEIGHTS: weights})


def test_a_preview_is_served_before_any_version_is(store: Store) -> None:
    written = preview(store, 100)
    assert written.reference.startswith("rex@preview-100-")
    assert store.fetch("rex@preview") == store.fetch(written.reference) == written
    assert (store.folder("rex@preview") / WEIGHTS).read_bytes() == b"weights 100"
    assert store.verify("rex@preview") == []
    assert store.previewed() == ["rex"]
    assert (store.subjects(), list(store.records())) == ([], [])
    for reference in ("rex", "rex@latest", "rex@1"):
        with pytest.raises(NotPublishedError, match="rex@preview is there"):
            store.fetch(reference)


def test_a_newer_one_takes_its_place_and_leaves_it_to_its_readers(store: Store) -> None:
    first = preview(store, 100)
    folder = store.folder(first.reference)
    second = preview(store, 200)
    assert store.fetch("rex@preview") == second
    assert (folder / WEIGHTS).read_bytes() == b"weights 100"  # whoever began with it goes on
    preview(store, 300)
    assert not folder.exists()
    with pytest.raises(NotPublishedError, match="no such preview now"):
        store.folder(first.reference)
    assert store.folder(second.reference).exists()


def test_the_same_checkpoint_again_is_the_same_preview(store: Store) -> None:
    first = preview(store, 100)
    again = preview(store, 100)
    assert again.reference == first.reference
    assert preview(store, 100, "rex-2").reference != first.reference


def test_readers_see_old_or_new_and_never_half(store: Store) -> None:
    preview(store, 0)
    seen, wrong, stop = set[int | None](), list[str](), threading.Event()
    looked = threading.Semaphore(0)

    def read() -> None:
        while not stop.is_set():
            record = store.fetch("rex@preview")
            text = (store.folder(record.reference) / WEIGHTS).read_text()
            if text != f"weights {record.num_train_steps}" or store.verify(record.reference):
                wrong.append(text)
            seen.add(record.num_train_steps)
            looked.release()

    reader = threading.Thread(target=read)
    reader.start()
    for train_step in range(1, 30):
        preview(store, train_step)
        while looked.acquire(blocking=False):
            pass
        assert looked.acquire(timeout=10)  # a reader is never two previews behind
    stop.set()
    reader.join()
    assert wrong == []
    assert len(seen) > 3


def test_a_preview_goes_with_its_job_alone(store: Store) -> None:
    written = preview(store, 100)
    assert store.drop_preview("rex", "another-job") is None
    assert store.drop_preview("rex", "rex-1") == written.reference
    with pytest.raises(NotPublishedError, match="no subject 'rex' is published"):
        store.fetch("rex@preview")
    assert store.previewed() == []
    assert store.drop_preview("rex") is None
    assert store.drop_preview("nobody") is None


def test_a_preview_is_no_version(store: Store) -> None:
    preview(store, 100)
    published = store.publish(a_record(), {WEIGHTS: store.root.parent / "weights"})
    assert (published.version, published.preview) == (1, None)
    with pytest.raises(NotPublishedError, match="no version 'preview': found versions 1, latest"):
        store.resolve("rex@preview")
    assert store.delete("rex@1") == ["rex@1"]
    assert store.fetch("rex@preview").num_train_steps == 100  # its job still runs
    store.publish(a_record(), {WEIGHTS: store.root.parent / "weights"})
    gone = store.delete("rex")
    assert gone[0] == "rex@1"
    assert gone[1].startswith("rex@preview-100-")
    assert not (store.root / "rex").exists()


def test_a_write_that_fails_leaves_the_one_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = preview(store, 100)

    def die(self: Path, target: Path) -> Path:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        with pytest.raises(StoreError, match="the disk is gone"):
            preview(store, 200)
    assert store.fetch("rex@preview") == first
    preview(store, 300)  # and clears what was left
    assert len(list((store.root / "rex").glob("preview-*"))) == 2
    assert not list((store.root / "rex").glob(".*"))


def test_damage_is_told(store: Store) -> None:
    written = preview(store, 100)
    (store.folder(written.reference) / RECORD).write_text("{")
    with pytest.raises(StoreError, match="not readable"):
        store.fetch("rex@preview")
    (store.root / "rex" / POINTER).write_text("{")
    with pytest.raises(StoreError, match=f"{POINTER} is not readable"):
        store.fetch("rex@preview")
    assert store.drop_preview("rex", "another-job") == "rex@preview"  # of nobody any more
    assert store.previewed() == []
    for reference in ("../rex@preview", "rexx@preview"):
        with pytest.raises(NotPublishedError, match="no subject"):
            store.fetch(reference)
