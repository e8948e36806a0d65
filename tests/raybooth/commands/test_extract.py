"""`raybooth extract` publishes, tells what was lost, and judges where it can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.encoders import write_tiny_encoders
from tests.raybooth.fleet.fleets import draw_photos
from tests.raybooth.model.test_extract import moved
from tests.raybooth.test_extract import publish_full
from tests.tiny import write_tiny_base

from raybooth.cli import main
from raybooth.data.images import photo_digest
from raybooth.home import store_folder
from raybooth.model.base import load_base
from raybooth.store import PhotoRecord, Store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(a base, an image encoder, a CLIP)."""
    folder = tmp_path_factory.mktemp("extract")
    return write_tiny_base(folder / "base"), *write_tiny_encoders(folder)


@pytest.fixture
def photos(tmp_path: Path, made: tuple[Path, Path, Path], raybooth_home: Path) -> Path:
    """The photos of `rex`, which is published as a full fine-tune."""
    folder = draw_photos(tmp_path / "photos", 0)
    names = sorted(folder.iterdir())
    told = tuple(PhotoRecord(name=path.name, sha256=photo_digest(path)) for path in names)
    base = load_base(str(made[0]))
    publish_full(Store(store_folder()), base, moved(base, rank=3)[0], told)
    return folder


def test_an_extract_is_published_and_judged_beside_the_full_model(
    photos: Path, made: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    judges = ["--image-encoder", str(made[1]), "--clip", str(made[2]), "--photos", str(photos)]
    words = ["extract", "rex@1", "--rank", "3", "--images", "1", *judges, "--json"]
    capsys.readouterr()
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    record = Store(store_folder()).fetch("rex@2")
    assert told == {**record.model_dump(mode="json"), "notes": []}
    loss = told["extracted"]
    assert loss["sites_error"] < 1e-5
    full, extract = loss["fidelity"]["full"], loss["fidelity"]["extract"]
    assert full.keys() == extract.keys() == {"dino", "clip_i", "clip_t", "pres", "div"}
    assert extract["dino"] == pytest.approx(full["dino"], abs=1e-3)  # the same pictures
    assert set(loss["encoders"]) == {"image", "clip"}
    assert main(words) == 0
    assert "rex@2 is this very adapter" in json.loads(capsys.readouterr().out)["notes"][0]
    assert Store(store_folder()).versions("rex") == [1, 2]
    assert main(["extract", "rex"]) == 2
    assert "rex@2 is an adapter already: found rank 3, extracted" in capsys.readouterr().err


def test_without_judges_the_rest_is_told(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", "rex", "--rank", "20", "--energy", "0.9", "--as", "max"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "rex@1 at rank" in out
    assert "of the output's move at timestep 125" in out
    assert "subject fidelity was not measured: the base" in out
    assert Store(store_folder()).fetch("max").kind == "adapter"
    assert main(["extract", "rex@1", "--rank", "17", "--no-evaluation"]) == 0
    assert "served where engine.max_rank is 17 or more" in capsys.readouterr().out


def test_what_cannot_be_is_refused(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (["--rank", "0"], "the rank is out of range"),
        (["--as", "No"], "this subject id cannot be used"),
        (["--photos", str(photos)], "needs --image-encoder"),
        (["--photos", str(photos), "--no-evaluation"], "leaves nothing to judge"),
        (["--rank", "1", "--energy", "0.99"], "keeps less energy than 0.99"),
    ):
        assert main(["extract", "rex", *words]) == 2
        assert says in capsys.readouterr().err
    assert Store(store_folder()).versions("rex") == [1]
