"""`raybooth bench dreambench` is one fleet on Ray, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.encoders import write_tiny_encoders
from tests.raybooth.fleet.fleets import TRAIN, draw_photos
from tests.tiny import write_tiny_base

from raybooth.cli import main
from raybooth.home import home


@pytest.mark.ray
def test_two_subjects_become_the_paper_s_table(
    tmp_path: Path, ray_session: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    draw_photos(folder / "red_dog", 1)
    draw_photos(folder / "vase", 2)
    classes = "Classes\n\nsubject_name,class\nred_dog,dog\nvase,vase\n\nPrompts\n"
    (folder / "prompts_and_classes.txt").write_text(classes, encoding="utf-8")
    train = tmp_path / "train.yaml"
    train.write_text(json.dumps(TRAIN), encoding="utf-8")
    image, clip = write_tiny_encoders(tmp_path / "encoders")
    base = write_tiny_base(tmp_path / "base")
    words = ["bench", "dreambench", str(folder), "--base", str(base), "--train", str(train)]
    words += ["--prompts", "2", "--images", "2", "--class-images", "1"]
    words += ["--image-encoder", str(image), "--clip", str(clip)]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["subject"] for one in document["subjects"]] == ["red-dog@1", "vase@1"]
    assert document["num_images"] == 2 * 2 * 2
    assert document["subjects"][0]["prompts"][0] == "a {identifier} {class_noun} in the jungle"
    dinos = [one["dino"] for one in document["subjects"]]
    assert document["ours"]["dino"] == pytest.approx(sum(dinos) / 2)
    assert [row["dino"] for row in document["published"]] == [0.774, 0.696, 0.668, 0.569]
    reports = {path: path.stat().st_mtime_ns for path in (home() / "dreambench").glob("*.json")}
    assert len(reports) == 2
    assert main(words) == 0  # nothing is trained or drawn again
    shown = capsys.readouterr().out
    assert "DreamBooth (Stable Diffusion)" in shown
    assert "0.668" in shown
    assert {path: path.stat().st_mtime_ns for path in reports} == reports
    dog, vase = sorted(reports)
    text = vase.read_text(encoding="utf-8")
    vase.unlink()  # as if killed before it was written
    assert main(words) == 0
    assert vase.read_text(encoding="utf-8") == text
    assert dog.stat().st_mtime_ns == reports[dog]
