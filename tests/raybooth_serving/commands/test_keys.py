"""`raybooth keys` as people and scripts use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raybooth.cli import main
from raybooth_serving.access.keys import KeyRecord, Keyring

Capture = pytest.CaptureFixture[str]


def _run(capsys: Capture, *words: str) -> tuple[int, str, str]:
    status = main(["keys", *words])
    told = capsys.readouterr()
    return status, told.out, told.err


def _find(ring: Keyring, secret: bytes) -> KeyRecord | None:
    ring.refresh()
    return ring.find(secret)


@pytest.fixture
def ring(raybooth_home: Path) -> Keyring:
    return Keyring(raybooth_home / "keys.json")


def test_a_key_s_life(ring: Keyring, capsys: Capture) -> None:
    words = ["--subjects", "dog-*", "cat", "--rate-images-per-minute", "30"]
    status, secret, told = _run(capsys, "create", "studio", *words, "--expires", "2099-01-31")
    assert status == 0
    secret = secret.strip()
    assert "sees dog-* cat" in told
    assert secret not in told
    key = _find(ring, secret.encode())
    assert key is not None
    assert (key.subjects, key.images_per_minute) == (("dog-*", "cat"), 30)

    _, table, _ = _run(capsys, "ls")
    for word in ("studio", key.id, "dog-*", "30", "2099-01-31"):
        assert word in table
    _, text, _ = _run(capsys, "ls", "--json")
    (row,) = json.loads(text)
    assert row["name"] == "studio"
    assert "sha256" not in row
    for listed in (table, text):
        assert secret not in listed
        assert key.sha256 not in listed

    _, other, _ = _run(capsys, "rotate", "studio")
    assert _find(ring, secret.encode()) is None
    assert _find(ring, other.strip().encode()) is not None
    status, told, _ = _run(capsys, "revoke", "studio")
    assert status == 0
    assert "refused from now on" in told
    assert ring.read() == ()
    assert "no API key yet" in _run(capsys, "ls")[1]


def test_a_key_sees_no_subject_unless_told(ring: Keyring, capsys: Capture) -> None:
    _, _, told = _run(capsys, "create", "studio")
    assert "no subject, only the bases" in told
    assert ring.read()[0].subjects == ()


def test_a_past_key_is_marked(ring: Keyring, capsys: Capture) -> None:
    _run(capsys, "create", "old", "--expires", "2099-01-31")
    ring.path.write_text(ring.path.read_text().replace("2099", "2020"))
    assert "(past)" in " ".join(_run(capsys, "ls")[1].split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["create", "Not A Name"], "key name cannot be used"),
        (["create", "a", "--subjects", "dog@3"], "no glob of subjects"),
        (["create", "a", "--rate-images-per-minute", "0"], "rate cannot be used"),
        (["create", "a", "--rate-images-per-minute", "nan"], "rate cannot be used"),
        (["create", "a", "--rate-images-per-minute", "inf"], "rate cannot be used"),
        (["create", "a", "--expires", "soon"], "not understood"),
        (["create", "a", "--expires", "2020-01-01"], "expired at once"),
        (["revoke", "nobody"], "no key is called 'nobody'"),
        (["rotate", "nobody"], "no key is called 'nobody'"),
    ],
)
def test_what_cannot_be_done(ring: Keyring, capsys: Capture, words: list[str], told: str) -> None:
    status, out, error = _run(capsys, *words)
    assert status == 2
    assert out == ""
    assert told in error
    assert not ring.path.exists()


def test_it_needs_neither_torch_nor_ray() -> None:
    roots = [str(Path(__file__).parents[2] / name) for name in ("platform", "serving")]
    code = (
        f"import sys; sys.path[:0] = {roots!r}\n"
        "from raybooth.cli import main\n"
        "assert main(['keys', 'create', 'a']) == 0 and main(['keys', 'ls']) == 0\n"
        "print(sorted({'torch', 'ray', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
