"""API keys in their file: made, found, rotated, revoked, by several processes."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from raybooth.errors import InputError, StoreError
from raybooth_serving.access.keys import PREFIX, KeyRecord, Keyring, parse_expiry


def _find(ring: Keyring, secret: bytes) -> KeyRecord | None:
    ring.refresh()
    return ring.find(secret)


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "keys.json")


def test_a_secret_is_long_random_and_kept_nowhere(ring: Keyring) -> None:
    made = [ring.create(f"key-{number}") for number in range(20)]
    secrets = {secret for _, secret in made}
    assert len(secrets) == 20
    text = "".join(path.read_text() for path in ring.path.parent.iterdir())
    for key, secret in made:
        assert secret.startswith(PREFIX)
        assert len(secret) >= len(PREFIX) + 43, "256 bits"
        assert secret not in text
        assert secret not in repr(key)
        assert _find(ring, secret.encode()) == key
    assert len({key.id for key, _ in made}) == 20


def test_what_is_no_key_is_not_found(ring: Keyring) -> None:
    key, secret = ring.create("one")
    wrong = ["", PREFIX, secret[:-1], secret + "=", secret.upper(), key.id, key.sha256, "ключ"]
    assert [_find(ring, each.encode()) for each in wrong] == [None] * len(wrong)


def test_the_file_is_its_owner_s_alone_and_left_whole(ring: Keyring) -> None:
    ring.create("one")
    ring.create("two")
    assert {path.name for path in ring.path.parent.iterdir()} == {"keys.json", "keys.lock"}
    assert stat.S_IMODE(ring.path.stat().st_mode) == 0o600


def test_another_process_revokes_and_the_reader_sees_it(ring: Keyring) -> None:
    _, first = ring.create("first")
    _, second = ring.create("second")
    reader = Keyring(ring.path)
    assert _find(reader, first.encode()) is not None
    ring.revoke("first")
    assert _find(reader, first.encode()) is None
    assert _find(reader, second.encode()) is not None
    ring.path.unlink()
    assert _find(reader, second.encode()) is None, "no file, no keys"


def test_an_unchanged_file_is_not_parsed_again(ring: Keyring) -> None:
    ring.create("one")
    assert ring.read() is ring.read()


def test_rotation_keeps_the_key_and_ends_its_secret(ring: Keyring) -> None:
    old, old_secret = ring.create("one", subjects=["dog-*"], images_per_minute=3)
    ring.create("two")
    new, new_secret = ring.rotate("one")
    assert new.model_copy(update={"sha256": old.sha256}) == old
    assert _find(ring, old_secret.encode()) is None
    assert _find(ring, new_secret.encode()) == new
    assert [key.name for key in ring.read()] == ["one", "two"]


def test_writers_in_several_processes_lose_nothing(ring: Keyring) -> None:
    code = (
        "import sys; from pathlib import Path; from raybooth_serving.access.keys import Keyring\n"
        "ring = Keyring(Path(sys.argv[1]))\n"
        "for n in range(8): ring.create(f'{sys.argv[2]}-{n}')\n"
    )
    roots = [str(Path(__file__).parents[2] / name) for name in ("platform", "serving")]
    code = f"import sys; sys.path[:0] = {roots!r}\n{code}"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(ring.path), name]) for name in ("a", "b")
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    assert sorted(key.name for key in ring.read()) == sorted(
        f"{w}-{n}" for w in "ab" for n in range(8)
    )


def test_a_name_is_taken_once_and_must_exist(ring: Keyring) -> None:
    ring.create("one")
    with pytest.raises(InputError, match="a key has this name"):
        ring.create("one")
    for act in (ring.revoke, ring.rotate):
        with pytest.raises(InputError, match="no key is called 'two': found keys one"):
            act("two")


@pytest.mark.parametrize("name", ["", "One", "a b", "-a", "a" * 64, "a/b", "ключ"])
def test_names_that_cannot_be_used(ring: Keyring, name: str) -> None:
    with pytest.raises(InputError, match="key name cannot be used"):
        ring.create(name)


@pytest.mark.parametrize("glob", ["", "dog@3", "Dog", "dog/*", "dog *", "*" * 64])
def test_globs_that_cannot_be_used(ring: Keyring, glob: str) -> None:
    with pytest.raises(InputError, match="no glob of subjects"):
        ring.create("one", subjects=["cat-*", glob])
    assert ring.read() == ()


def test_expiry(ring: Keyring) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)
    key, _ = ring.create("one", expires=soon)
    assert not key.is_expired(soon - timedelta(seconds=1))
    assert key.is_expired(soon)
    assert ring.read()[0].expires == soon
    with pytest.raises(InputError, match="expired at once"):
        ring.create("two", expires=datetime.now(UTC))


def test_expiries_as_people_write_them() -> None:
    assert parse_expiry("2031-01-31") == datetime(2031, 1, 31, 23, 59, 59, tzinfo=UTC)
    assert parse_expiry("2031-01-31T12:00:00+02:00") == datetime(2031, 1, 31, 10, tzinfo=UTC)
    for text in ("tomorrow", "2031-01-31T12:00:00", "2031-13-01", "31.1.2031", ""):
        with pytest.raises(InputError, match="not understood"):
            parse_expiry(text)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"keys": [{}]}', '{"schema_version": 2}', "é"])
def test_a_damaged_file_is_an_error_and_those_read_last_go_on(
    ring: Keyring, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, secret = ring.create("one")
    assert _find(ring, secret.encode()) is not None
    ring.path.write_text(text)
    with pytest.raises(StoreError, match="not a file of keys"):
        ring.read()
    with pytest.raises(StoreError):
        ring.revoke("one")
    assert ring.path.read_text() == text, "what is damaged is not written over"
    assert _find(ring, secret.encode()) is not None
    assert "read last go on" in caplog.text
    assert _find(Keyring(ring.path), secret.encode()) is None, "nobody has read it before"


def test_the_file_reads_as_plain_json(ring: Keyring) -> None:
    ring.create("one", subjects=["dog-*"], images_per_minute=30)
    (row,) = json.loads(ring.path.read_text())["keys"]
    assert row["subjects"] == ["dog-*"]
    assert row["images_per_minute"] == 30
    assert set(row) == {
        *("name", "id", "sha256", "subjects", "images_per_minute", "created", "expires")
    }
