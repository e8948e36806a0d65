"""Aliases move and move back, whoever moves them at the same time, whenever a writer dies."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.raybooth.test_store import a_record

from raybooth.aliases import ALIASES
from raybooth.errors import InputError, NotPublishedError, StoreError
from raybooth.store import WEIGHTS, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three versions of `rex`."""
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    store = Store(tmp_path / "models")
    for _ in range(3):
        store.publish(a_record(), {WEIGHTS: weights})
    return store


def test_promote_and_roll_back_walk_the_same_way(store: Store) -> None:
    assert [store.promote(f"rex@{version}") for version in (1, 3, 2)] == [(None, 1), (1, 3), (3, 2)]
    assert store.resolve("rex@production") == ("rex", 2)
    assert store.resolve("rex") == ("rex", 3)  # plain is latest, whatever is promoted
    assert store.roll_back("rex") == (2, 3)
    assert store.roll_back("rex") == (3, 1)
    with pytest.raises(InputError, match="pointed at no version before"):
        store.roll_back("rex")
    assert store.promote("rex@production", "canary") == (None, 1)
    assert store.aliases("rex") == {"latest": 3, "production": 1, "canary": 1}


def test_the_file_keeps_every_move_with_its_time(store: Store) -> None:
    store.promote("rex@1")
    store.promote("rex@2")
    store.roll_back("rex")
    moves = store.alias_history("rex")["production"]
    assert [(m.action, m.version) for m in moves] == [("set", 1), ("set", 2), ("rollback", 1)]
    assert all(move.time for move in moves)
    store.promote("rex@1")  # it points there: nothing moves
    assert len(store.alias_history("rex")["production"]) == 3


def test_latest_is_the_newest_again_after_a_rollback(store: Store) -> None:
    store.promote("rex@1", "latest")
    assert store.resolve("rex") == ("rex", 1)
    assert store.roll_back("rex", "latest") == (1, 3)
    with pytest.raises(InputError, match="no version before"):
        store.roll_back("rex", "latest")


def test_what_cannot_be_promoted_leaves_the_alias(store: Store) -> None:
    store.promote("rex@1")
    (store.folder("rex@2") / WEIGHTS).write_bytes(b"weightz")
    with pytest.raises(StoreError, match="rex@2 is damaged"):
        store.promote("rex@2")
    with pytest.raises(NotPublishedError, match="no version '7'"):
        store.promote("rex@7")
    with pytest.raises(InputError, match="a preview cannot be promoted"):
        store.promote("rex@preview")
    with pytest.raises(InputError, match="this alias cannot be used"):
        store.promote("rex@3", "preview")
    with pytest.raises(NotPublishedError, match="no alias 'canary' to roll back"):
        store.roll_back("rex", "canary")
    assert store.resolve("rex@production") == ("rex", 1)


def test_a_rollback_never_lands_on_a_deleted_or_damaged_version(
    store: Store, tmp_path: Path
) -> None:
    store.promote("rex@3")
    store.promote("rex@1")
    store.delete("rex@3")
    store.publish(a_record("rex", "other"), {WEIGHTS: tmp_path / "weights"})
    assert store.versions("rex") == [1, 2, 3]  # the number is given again, to another model
    with pytest.raises(InputError, match="pointed at before was deleted: found version 3"):
        store.roll_back("rex")
    store.promote("rex@2")
    (store.folder("rex@1") / WEIGHTS).unlink()
    with pytest.raises(StoreError, match="rex@1 is damaged"):
        store.roll_back("rex")
    assert store.resolve("rex@production") == ("rex", 2)


def test_a_version_that_is_named_is_not_deleted(store: Store) -> None:
    store.promote("rex@2")
    with pytest.raises(InputError, match="an alias points at rex@2: found production of rex"):
        store.delete("rex@production")
    assert store.delete("rex@2", with_aliases=True) == ["rex@2"]
    assert "production" not in store.aliases("rex")
    with pytest.raises(InputError, match="was deleted"):
        store.roll_back("rex")
    store.promote("rex@1")
    assert store.delete("rex") == ["rex@1", "rex@3"]  # the whole subject, aliases and all


def test_the_first_form_of_the_file_is_read(store: Store) -> None:
    (store.root / "rex" / ALIASES).write_text(json.dumps({"production": 1, "latest": 2}))
    assert store.resolve("rex") == ("rex", 2)
    store.promote("rex@3")
    assert store.roll_back("rex") == (3, 1)
    (store.root / "rex" / ALIASES).write_text("{")
    with pytest.raises(StoreError, match="delete it to fall back"):
        store.resolve("rex")


def _promote_many(root: Path, alias: str) -> None:
    store = Store(root)
    for place in range(10):
        store.promote(f"rex@{1 + place % 3}", alias)


def test_two_promoters_lose_nothing(store: Store) -> None:
    code = (
        "import sys; from pathlib import Path; from raybooth.store import Store; "
        "store = Store(Path(sys.argv[1])); "
        "[store.promote(f'rex@{1 + place % 3}', sys.argv[2]) for place in range(10)]"
    )
    command = [sys.executable, "-c", code, str(store.root)]
    processes = [subprocess.Popen([*command, name]) for name in ("blue", "green")]
    assert [process.wait() for process in processes] == [0, 0]
    history = store.alias_history("rex")
    assert {name: len(moves) for name, moves in history.items()} == {"blue": 10, "green": 10}
    assert store.aliases("rex") == {"latest": 3, "blue": 1, "green": 1}


def test_an_interrupted_write_leaves_the_old_file(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.promote("rex@1")

    def die(self: Path, target: Path) -> Path:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        with pytest.raises(StoreError, match="could not be changed: found the disk is gone"):
            store.promote("rex@2")
    assert store.resolve("rex@production") == ("rex", 1)
    assert not list((store.root / "rex").glob(f".{ALIASES}-*"))
    store.promote("rex@2")  # the lock is free again


def test_threads_wait_for_each_other(store: Store) -> None:
    threads = [
        threading.Thread(target=_promote_many, args=(store.root, name)) for name in ("a", "b")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: len(moves) for name, moves in store.alias_history("rex").items()} == {
        "a": 10,
        "b": 10,
    }
