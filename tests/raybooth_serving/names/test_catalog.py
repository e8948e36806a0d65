"""Names while subjects come, go and number thousands, and while the store itself is away."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raybooth.errors import NotPublishedError, StoreError
from raybooth.model.base import Base
from raybooth.store import RECORD, Store
from raybooth_serving.errors import StoreAwayError
from raybooth_serving.names.catalog import Catalog, KnownBase
from tests.raybooth_serving.conftest import SUBJECTS
from tests.raybooth_serving.published import publish

AWAY: dict[str, Callable[[Path], None]] = {
    "missing": lambda root: None,
    "a file": lambda root: root.write_text("not a folder"),
    "unreadable": lambda root: root.symlink_to(root),  # a loop: OSError for root as well
}


class Heard(list[str]):
    """Subjects whose deletion was told."""


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def catalog(store: Store, base: Base, heard: Heard) -> Catalog:
    return Catalog(store, [KnownBase("tiny", base.fingerprint)], heard.append)


@contextmanager
def away(store: Store, how: str = "missing") -> Iterator[None]:
    aside = store.root.with_name("aside")
    store.root.rename(aside)
    AWAY[how](store.root)
    yield
    store.root.unlink(missing_ok=True)
    aside.rename(store.root)


@pytest.mark.parametrize("how", AWAY)
def test_names_mean_what_they_meant_while_the_store_is_away(
    catalog: Catalog, store: Store, base: Base, heard: Heard, how: str
) -> None:
    record = catalog.resolve("dog-a")
    with away(store, how):
        assert catalog.resolve("dog-a") == record
        assert catalog.resolve("tiny") is None
        for name in ("dog-b", "dog-a@1", "no-such"):
            with pytest.raises(StoreAwayError, match=f"{name} is not in memory, and the store is"):
                catalog.resolve(name)
        with pytest.raises(StoreAwayError, match="the list of models"):
            catalog.cards()
        assert catalog.recall.metrics.store_away_requests == 5
    newer = publish(store, base, "dog-a", 9)
    assert catalog.resolve("dog-a") == newer
    assert [card.id for card in catalog.cards()] == ["tiny", *SUBJECTS]
    assert heard == []


def test_away_and_back_are_told_once(
    catalog: Catalog, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    catalog.resolve("dog-a")
    with away(store):
        for _ in range(3):
            catalog.resolve("dog-a")
    catalog.resolve("dog-a")
    said = [record.message.partition(":")[0] for record in caplog.records]
    assert said == ["the store is away, subjects in memory go on", "the store is back"]


def test_deleted_is_not_away(catalog: Catalog, store: Store, heard: Heard) -> None:
    for name in ("dog-a", "dog-a@1", "dog-b", "robot-c"):
        catalog.resolve(name)
    store.delete("dog-a")
    shutil.rmtree(store.root / "robot-c")
    for name in ("dog-a", "dog-a@1"):
        with pytest.raises(NotPublishedError, match="no subject 'dog-a' is published"):
            catalog.resolve(name)
    assert heard == ["dog-a"]
    catalog.cards()
    assert heard == ["dog-a", "robot-c"]
    with away(store):
        for name in ("dog-a", "dog-a@1", "robot-c"):
            with pytest.raises(StoreAwayError):
                catalog.resolve(name)
        assert catalog.resolve("dog-b") is not None


def test_nobody_deletes_a_subject_by_asking_for_what_never_was(
    catalog: Catalog, store: Store, heard: Heard
) -> None:
    catalog.resolve("dog-a")
    stranger = catalog.seen_by(["robot-*"])
    for view, name in ((catalog, "dog-a@9"), (catalog, "dog-a@none"), (stranger, "dog-a")):
        with pytest.raises(NotPublishedError):
            view.resolve(name)
    assert [card.id for card in stranger.cards()] == ["tiny", "robot-c"]
    assert heard == []
    with away(store):
        assert catalog.resolve("dog-a") is not None
        with pytest.raises(StoreAwayError):
            stranger.resolve("dog-a")


def test_a_damaged_record_is_neither_away_nor_deleted(
    catalog: Catalog, store: Store, heard: Heard
) -> None:
    catalog.resolve("dog-a")
    path = store.folder("dog-a") / RECORD
    path.write_text("{")
    with pytest.raises(StoreError, match="is not readable") as caught:
        catalog.resolve("dog-a")
    path.unlink()
    with pytest.raises(StoreError, match="is not readable"):
        catalog.resolve("dog-a")
    assert not isinstance(caught.value, StoreAwayError)
    assert heard == []
    assert [card.id for card in catalog.cards()] == ["tiny", *SUBJECTS[1:]]


def test_a_store_that_was_never_there_is_empty(tmp_path: Path, base: Base) -> None:
    catalog = Catalog(Store(tmp_path / "models"), [KnownBase("tiny", base.fingerprint)])
    assert [card.id for card in catalog.cards()] == ["tiny"]
    with pytest.raises(NotPublishedError):
        catalog.resolve("dog-a")


def test_names_are_remembered_within_bounds(catalog: Catalog, store: Store) -> None:
    catalog.recall.max_names = 2
    for name in ("dog-a", "dog-b", "dog-a", "robot-c"):
        catalog.resolve(name)
    with away(store):
        assert catalog.resolve("dog-a") is not None
        with pytest.raises(StoreAwayError):
            catalog.resolve("dog-b")


def test_a_list_shows_what_happened_a_moment_ago(
    catalog: Catalog, store: Store, base: Base
) -> None:
    def listed() -> list[str]:
        return [card.id for card in catalog.cards(with_versions=True)][1:]

    before = listed()
    publish(store, base, "dog-a", 7)
    publish(store, base, "zebra", 8)
    assert listed() == ["dog-a", "dog-a@1", "dog-a@2", *before[2:], "zebra", "zebra@1"]
    store.delete("dog-a@1", with_aliases=True)
    store.delete("zebra")
    assert listed() == ["dog-a", "dog-a@2", *before[2:]]


def test_thousands_of_subjects_cost_a_name_nothing(
    catalog: Catalog, store: Store, opened: list[str]
) -> None:
    """What is opened and listed for one name, with 4 and with 304 subjects."""
    counts = []
    for _ in range(2):
        opened.clear()
        catalog.resolve("dog-a")
        catalog.resolve("dog-a@1")
        counts.append(len(opened))
        _copies(store, 300)
    assert counts[0] == counts[1] < 16
    assert len(catalog.cards()) == 305
    opened.clear()
    assert len(catalog.cards()) == 305
    assert len(opened) <= 1 + 5 * 4  # the store itself, and four that were published just now
    opened.clear()
    with pytest.raises(NotPublishedError, match=r"did you mean copy-123, "):
        catalog.resolve("copi-123")
    assert len(opened) < 20


def _copies(store: Store, count: int) -> None:
    text = (store.folder("dog-a") / RECORD).read_text("utf-8")
    for number in range(count):
        folder = store.root / f"copy-{number:03d}" / "1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(text.replace("dog-a", f"copy-{number:03d}"), "utf-8")
        os.utime(folder.parent, (1, 1))


_OPENED: list[list[str]] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _OPENED and event in ("open", "os.listdir", "os.scandir"):
        _OPENED[-1].append(str(arguments[0]))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every file that is opened and every folder that is listed, by this process."""
    if not _OPENED:
        sys.addaudithook(_audit)  # for the life of the process
    _OPENED.append([])
    yield _OPENED[-1]
    _OPENED.clear()
