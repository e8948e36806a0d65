"""The protocol's prompts and folder are the dataset's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raybooth.dreambench import LIVE_PROMPTS, OBJECT_PROMPTS, fleet_text, read_subjects
from raybooth.errors import InputError
from raybooth.subject import load_fleet


def test_the_prompts_are_those_of_the_dataset(shared_data: Path) -> None:
    text = (shared_data / "dreambench" / "prompts_and_classes.txt").read_text(encoding="utf-8")
    lists = re.findall(r"prompt_list = \[(.*?)\n\]", text, re.DOTALL)
    found = [re.findall(r"'(a .*?)'\.format", each) for each in lists]
    ours = [
        [prompt.format(identifier="{0}", class_noun="{1}") for prompt in prompts]
        for prompts in (OBJECT_PROMPTS, LIVE_PROMPTS)
    ]
    assert ours == found
    assert [len(prompts) for prompts in found] == [25, 25]


def test_the_folder_becomes_a_fleet(shared_data: Path, tmp_path: Path) -> None:
    subjects = read_subjects(shared_data / "dreambench")
    assert len(subjects) == 8
    by_id = {one.subject_id: one for one in subjects}
    assert by_id["backpack-dog"].class_noun == "backpack"
    assert by_id["cat2"].prompts == LIVE_PROMPTS
    assert by_id["robot-toy"].class_noun == "toy"
    assert by_id["robot-toy"].prompts == OBJECT_PROMPTS
    path = tmp_path / "fleet.yaml"
    path.write_text(fleet_text(subjects, "pocket", None, "pocket-lora"), encoding="utf-8")
    fleet = load_fleet(path)
    assert [one.subject_id for one in fleet.subjects] == [one.subject_id for one in subjects]
    assert all(len(one.images) >= 4 for one in fleet.subjects)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_subjects(tmp_path)
    (tmp_path / "prompts_and_classes.txt").write_text("dog,dog\n", encoding="utf-8")
    with pytest.raises(InputError, match="no subject to evaluate"):
        read_subjects(tmp_path)
    with pytest.raises(InputError, match="no subject 'cat'"):
        read_subjects(tmp_path, ["cat"])
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match="names no class"):
        read_subjects(tmp_path)
