"""`raybooth prior ls | build | gc` as a person uses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.tiny import write_tiny_base

from raybooth.cli import main
from raybooth.data.prior import PriorCache

TRAIN = """
resolution: 32
num_train_steps: 2
prior: {num_images: 3, num_inference_steps: 2, guidance_scale: 3}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def train(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(TRAIN)
    return path


@pytest.fixture
def fleet(base: Path, train: Path, tmp_path: Path) -> Path:
    """Two dogs, a cat that wants more prior images, a robot without a prior."""
    for name in ("rex", "tom"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), "red").save(tmp_path / name / "0.png")
    path = tmp_path / "fleet.yaml"
    path.write_text(
        f"""
base: {base}
train: {train}
subjects:
  - {{id: rex, class_noun: dog, images: rex}}
  - {{id: fido, class_noun: dog, images: rex, overrides: {{prior: {{num_images: 2}}}}}}
  - {{id: tom, class_noun: cat, images: tom, overrides: {{prior: {{num_images: 4}}}}}}
  - {{id: bot, class_noun: robot, images: tom,
      overrides: {{prior: {{num_images: 0, loss_weight: 0}}}}}}
"""
    )
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main(["prior", *map(str, arguments)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    return json.loads(run(capsys, *arguments, "--json"))  # type: ignore[no-any-return]


def test_an_empty_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no prior is cached yet" in run(capsys, "ls")
    assert run_json(capsys, "ls") == []
    assert "deleted 0 priors" in run(capsys, "gc", "--all")


def test_build_for_a_fleet_makes_each_prior_once(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run_json(capsys, "build", fleet)
    found = [(row["class_prompt"], row["num_images"], row["num_generated"]) for row in made]
    assert found == [("a photo of a dog", 3, 3), ("a photo of a cat", 4, 4)]
    again = run(capsys, "build", fleet)
    assert "'a photo of a dog': 3 images, 3 cached, 0 made" in again
    assert "'a photo of a cat': 4 images, 4 cached, 0 made" in again
    assert "5 images, 3 cached, 2 made" in run(capsys, "build", fleet, "-n", 5)


def test_build_for_a_class_noun_is_the_prior_that_a_fleet_needs(
    fleet: Path, base: Path, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--base", base, "--class-noun", "dog", "--train", train)
    assert "3 images, 0 cached, 3 made" in run(capsys, "build", *arguments)
    assert "4 images, 3 cached, 1 made" in run(capsys, "build", *arguments, "-n", 4)
    assert [row["num_generated"] for row in run_json(capsys, "build", fleet)] == [0, 4]


def test_ls_shows_what_is_there_and_what_is_damaged(
    fleet: Path, raybooth_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    run(capsys, "build", fleet)
    cat, dog = run_json(capsys, "ls")
    assert (cat["class_prompt"], cat["num_whole"], cat["num_damaged"]) == ("a photo of a cat", 4, 0)
    assert (dog["class_prompt"], dog["num_whole"], dog["resolution"]) == ("a photo of a dog", 3, 32)
    path = raybooth_home / "priors" / dog["digest"] / "images" / "00001.png"
    path.write_bytes(path.read_bytes()[:-1])
    assert run_json(capsys, "ls")[1]["num_damaged"] == 1
    (line,) = (line for line in run(capsys, "ls").splitlines() if "a photo of a dog" in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[1].startswith("tiny ")
    assert (cells[2], cells[3], cells[5]) == ("32", "2", "1")
    assert "1 damaged files made again" in run(capsys, "build", fleet)
    assert run_json(capsys, "ls")[1]["num_damaged"] == 0


def test_gc(fleet: Path, raybooth_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "build", fleet)
    cat, dog = run_json(capsys, "ls")
    long_ago = time.time() - 40 * 86400
    os.utime(raybooth_home / "priors" / cat["digest"] / "record.json", (long_ago, long_ago))
    assert "would delete 1 priors" in run(capsys, "gc", "--older-than", 30, "--dry-run")
    assert len(run_json(capsys, "ls")) == 2
    assert "deleted 0 priors" in run(capsys, "gc", "--unused-by", fleet)
    text = fleet.read_text()
    fleet.write_text(text.replace("class_noun: cat", "class_noun: vase"))
    out = run(capsys, "gc", "--unused-by", fleet)
    assert "deleted 'a photo of a cat'" in out
    assert [row["digest"] for row in run_json(capsys, "ls")] == [dog["digest"]]
    assert [row["digest"] for row in run_json(capsys, "gc", "--all")] == [dog["digest"]]
    assert PriorCache(raybooth_home / "priors").entries() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build"], "needs a fleet file or a class noun: found neither"),
        (["build", "FLEET", "--class-noun", "dog"], "found both"),
        (["build", "FLEET", "--base", "pocket"], "--base has no effect with a fleet file"),
        (["build", "gone.yaml"], "gone.yaml cannot be read"),
        (["build", "--base", "/nowhere", "--class-noun", "dog"], "no base is called"),
        (["build", "--class-noun", "dog", "--train", "gone"], "no train config is called 'gone'"),
        (["build", "FLEET", "-n", "0"], "must be at least 1"),
        (["gc", "--older-than", "-1"], "must not be negative"),
        (["gc", "--unused-by", "gone.yaml"], "gone.yaml cannot be read"),
    ],
)
def test_wrong_input_is_told_and_exits_2(
    arguments: list[str], words: str, fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [str(fleet) if argument == "FLEET" else argument for argument in arguments]
    assert main(["prior", *filled]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_gc_without_a_choice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["prior", "gc"])
    assert stopped.value.code == 2
    assert "--older-than" in capsys.readouterr().err


def test_a_home_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYBOOTH_HOME", str(tmp_path / "file"))
    assert main(["prior", "ls"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_listing_loads_neither_torch_nor_ray() -> None:
    program = (
        "import argparse, sys; from raybooth.commands.prior import register;"
        "p = argparse.ArgumentParser(); register(p.add_subparsers());"
        "a = p.parse_args(['prior', 'ls', '--json']); a.run(a);"
        "sys.exit([m for m in ('torch', 'ray', 'diffusers') if m in sys.modules] or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
