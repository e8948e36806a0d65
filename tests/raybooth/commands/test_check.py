"""`raybooth check` lists everything that is wrong at once, or prints the plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.raybooth.fleet.fleets import TRAIN, WITH_PRIOR, draw_photos, write_fleet
from tests.tiny import write_tiny_base, write_tiny_sdxl

from raybooth.commands import check
from raybooth.errors import ClusterError, InputProblems
from raybooth.fleet.memory import read_base_shape
from raybooth.model.base import load_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("check") / "base")


def run_check(path: Path, *options: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    check.register(parser.add_subparsers())
    arguments = parser.parse_args(["check", str(path), *options])
    code: int = arguments.run(arguments)
    return code


def problems(path: Path) -> list[str]:
    with pytest.raises(InputProblems) as caught:
        run_check(path)
    return [str(problem) for problem in caught.value.problems]


def write(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_a_good_fleet_is_planned(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subjects = {
        "rex": {"prior": WITH_PRIOR},
        "fido": {"prior": WITH_PRIOR},
        "tom": {"class_noun": "cat", "resolution": 64, "num_train_steps": 9},
    }
    assert run_check(write_fleet(tmp_path, base, subjects), "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_train_steps"] == 4 + 4 + 9
    assert [subject["subject_id"] for subject in plan["subjects"]] == ["rex", "fido", "tom"]
    assert len(plan["priors"]) == 1
    assert plan["priors"][0]["class_prompt"] == "a photo of a dog"
    assert (plan["priors"][0]["num_missing"], plan["priors"][0]["num_subjects"]) == (2, 2)
    assert sorted(name for pack in plan["packs"] for name in pack["subjects"]) == [
        "fido",
        "rex",
        "tom",
    ]
    assert all(pack["memory_bytes"] > 0 for pack in plan["packs"])
    assert ["tom"] in [pack["subjects"] for pack in plan["packs"]]


def test_a_full_run_is_told_its_own_memory(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {"rank": 4, "targets": "attention"}  # the defaults: a full run has no adapter
    full = {"method": "full", "adapter": plain, "optimizer": {"learning_rate": 1e-5}}
    subjects = {"rex": {}, "tom": {**full}, "kit": {**full, "full": {"text_encoder": True}}}
    assert run_check(write_fleet(tmp_path, base, subjects), "--json") == 0
    packs = json.loads(capsys.readouterr().out)["packs"]
    told = {pack["subjects"][0]: pack["memory_bytes"] for pack in packs}
    shape = read_base_shape(base)
    moments = 8 * shape.num_denoiser_parameters
    assert told["tom"] - told["rex"] > moments
    assert told["kit"] - told["tom"] > 8 * shape.texts[0].num_parameters


def test_the_plan_is_readable(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_check(write_fleet(tmp_path, base, {"rex": {"prior": WITH_PRIOR}})) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("nothing wrong", "pack-1", "rex", "a photo of a dog"))
    assert "4 subject train steps in all" in text


def test_checking_makes_no_queue_and_no_checkpoint(
    tmp_path: Path, base: Path, raybooth_home: Path
) -> None:
    run_check(write_fleet(tmp_path, base, {"rex": {}}))
    assert not list(raybooth_home.rglob("*.db"))
    assert not list(raybooth_home.rglob("*.safetensors"))


def test_everything_wrong_is_listed_at_once(tmp_path: Path, base: Path) -> None:
    path = write_fleet(tmp_path, base, {"rex": {}, "tom": {}, "kit": {}})
    values = json.loads(path.read_text())
    photos = tmp_path / "photos"
    (photos / "rex" / "0.png").write_bytes((photos / "rex" / "0.png").read_bytes()[:100])
    (photos / "tom" / "1.png").write_text("this is not a picture")
    (photos / "kit" / "1.png").write_bytes((photos / "kit" / "0.png").read_bytes())
    values["colour"] = "red"
    values["subjects"][1]["imagse"] = 3
    values["subjects"].append({"id": "Bad Id", "class_noun": "dog", "images": "photos/rex"})
    values["subjects"].append({"id": "lost", "class_noun": "dog", "images": "photos/lost"})
    values["subjects"].append({"id": "rex", "class_noun": "dog", "images": "photos/rex"})
    found = "\n".join(problems(write(path, values)))
    wrong = (
        "colour is not a known key",
        "imagse is not a known key",
        "Bad Id",
        "photos/lost",
        "'rex' is not unique",
        "rex/0.png",
        "tom/1.png",
        "kit",
    )
    assert not [text for text in wrong if text not in found]


def test_wrong_train_keys_do_not_hide_broken_photos(tmp_path: Path, base: Path) -> None:
    path = write_fleet(tmp_path, base, {"rex": {}}, {"learning_rat": 1e-4, "batch_size": 0})
    (tmp_path / "photos" / "rex" / "2.png").write_bytes(b"")
    found = problems(path)
    assert any("learning_rat" in problem for problem in found)
    assert any("batch_size" in problem for problem in found)
    assert any("2.png" in problem for problem in found)


def test_an_unknown_base_is_listed_with_the_photos(tmp_path: Path) -> None:
    path = write_fleet(tmp_path, "no-such-base", {"rex": {}})
    (tmp_path / "photos" / "rex" / "0.png").unlink()
    found = problems(path)
    assert any("no-such-base" in problem for problem in found)
    assert any("rex" in problem and "3" in problem for problem in found)


def test_an_empty_folder_is_listed(tmp_path: Path, base: Path) -> None:
    path = write_fleet(tmp_path, base, {"rex": {}})
    for photo in (tmp_path / "photos" / "rex").iterdir():
        photo.unlink()
    assert len(problems(path)) == 1


def test_targets_that_the_base_lacks_are_refused(tmp_path: Path, base: Path) -> None:
    path = write_fleet(tmp_path, base, {"rex": {"adapter": {"targets": ["to_q", "nonsense"]}}})
    (found,) = problems(path)
    assert "matches no layer" in found
    assert "nonsense" in found


def test_a_prompt_that_would_be_cut_is_refused_with_the_tokens(tmp_path: Path, base: Path) -> None:
    long = "a photo of {identifier} {class_noun} " + "on the beach " * 30
    (found,) = problems(write_fleet(tmp_path, base, {"rex": {"instance_prompt": long}}))
    assert "instance prompt is too long" in found
    assert "beach" in found


def test_an_identifier_of_many_tokens_is_a_warning_with_its_split(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_fleet(tmp_path, base, {"rex": {}})
    values = json.loads(path.read_text())
    values["defaults"] = {"identifier": "qqz"}
    assert run_check(write(path, values)) == 0
    warning = capsys.readouterr().err
    assert "'qqz' is 3 tokens" in warning
    assert "q + q + z" in warning


def test_a_single_token_is_no_warning(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_check(write_fleet(tmp_path, base, {"rex": {}}))
    assert "warning" not in capsys.readouterr().err


def test_resources_that_no_machine_has_are_refused(tmp_path: Path, base: Path) -> None:
    path = write_fleet(tmp_path, base, {"rex": {"resources": {"num_cpus": 4000}}})
    with pytest.raises(ClusterError, match="4000 CPU"):
        run_check(path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "base: [", "subjects: []\n", "\x00"])
def test_a_file_that_is_no_fleet_is_refused(tmp_path: Path, text: str) -> None:
    from raybooth.errors import InputError

    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    with pytest.raises(InputError):
        run_check(path)
    with pytest.raises(InputError, match="cannot be read"):
        run_check(tmp_path / "missing.yaml")


def test_what_is_published_is_left_out_of_the_plan(
    tmp_path: Path, base: Path, raybooth_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.raybooth.fleet.fleets import Mailbox, pack_task, survey_of

    from raybooth.fleet.task import Folders
    from raybooth.fleet.worker import train_pack_fn

    path = write_fleet(tmp_path, base, {"rex": {}, "tom": {}})
    folders = Folders.of_home()
    task = pack_task(survey_of(path, folders), folders, ["rex"])
    train_pack_fn({"task": task, "monitor": Mailbox()})
    assert run_check(path, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["published"] == ["rex@1"]
    assert [pack["subjects"] for pack in plan["packs"]] == [["tom"]]
    assert plan["num_train_steps"] == TRAIN["num_train_steps"]
    draw_photos(tmp_path / "photos" / "rex", 99)
    run_check(path, "--json")
    assert json.loads(capsys.readouterr().out)["published"] == []


def test_an_sdxl_base_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tokens are read, and both text encoders are counted."""
    base = write_tiny_sdxl(tmp_path / "base")
    path = write_fleet(tmp_path, base, {"rex": {"prior": WITH_PRIOR}})
    capsys.readouterr()
    assert run_check(path, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    loaded = load_base(str(base))
    assert plan["base"]["fingerprint"] == loaded.fingerprint
    parts = (loaded.vae, *loaded.text_encoders.values())
    held = sum(weight.numel() for part in parts for weight in part.parameters())
    assert read_base_shape(base).num_other_parameters == held


def test_checking_loads_no_heavy_library(tmp_path: Path, base: Path) -> None:
    code = (
        "import sys; from raybooth.cli import main; assert main(sys.argv[1:]) == 0; "
        "sys.exit(' '.join({'torch', 'diffusers', 'ray'} & set(sys.modules)) or None)"
    )
    path = write_fleet(tmp_path, base, {"rex": {"prior": WITH_PRIOR}})
    command = [sys.executable, "-c", code, "check", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
