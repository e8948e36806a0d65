"""`raybooth export` writes what was asked, says where, and refuses what it must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.raybooth_serving.published import publish, weights_of
from tests.tiny import write_tiny_base

from raybooth.cli import main
from raybooth.home import store_folder
from raybooth.model.base import Base, load_base
from raybooth.store import RECORD, WEIGHTS, Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(str(folder))


def export(*words: str | Path) -> int:
    return main(["export", *map(str, words)])


def test_the_report_names_every_file(
    base: Base, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(Store(store_folder()), base, "rex", 0)
    out = tmp_path / "out"
    words = ["rex@1", "--format", "diffusers", "-o", out, "--base", folder]
    assert export(*words, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["id"] == "rex@1"
    assert {Path(name).name for name in report["files"]} == {WEIGHTS, RECORD}
    assert all(Path(name).parent == out for name in report["files"])
    assert export(*words) == 2
    assert "add --force" in capsys.readouterr().err
    assert export(*words, "--force") == 0
    assert capsys.readouterr().out.startswith(f"rex@1 as diffusers: {out} (")


def test_another_base_a_damaged_model_and_strangers_are_refused(
    base: Base, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(store_folder())
    words = ["--format", "pipeline", "-o", tmp_path / "out", "--base", folder]
    record = publish(store, base, "rex", 0)
    publish(store, base, "other", 0, fingerprint="0" * 64)
    assert export("other", *words) == 2
    assert "trained on another base" in capsys.readouterr().err
    assert export("rexx", *words) == 2
    assert "did you mean rex?" in capsys.readouterr().err
    weights_of(store, record).write_bytes(b"")
    assert export("rex", *words) == 1
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
