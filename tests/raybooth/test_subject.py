"""Fleet files become resolved subjects, and every mistake is named at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from raybooth.errors import ConfigError, InputProblems
from raybooth.subject import load_fleet

TRAIN = """
train:
  resolution: 64
  optimizer: {learning_rate: 1e-4}
"""


def write_fleet(folder: Path, text: str) -> Path:
    photos = folder / "photos" / "rex"
    photos.mkdir(parents=True, exist_ok=True)
    for name in ("b.jpg", "a.png", ".hidden", "a.txt"):
        (photos / name).write_bytes(name.encode())
    path = folder / "fleet.yaml"
    path.write_text(text)
    return path


def test_subjects_are_resolved_with_their_overrides(tmp_path: Path) -> None:
    path = write_fleet(
        tmp_path,
        TRAIN
        + """
defaults:
  class_noun: dog
  overrides: {num_train_steps: 30}
subjects:
  - {id: rex, images: photos/rex}
  - id: tom
    class_noun: cat
    images: [photos/rex/a.png]
    identifier: zwx
    seed: 7
    prompts: {instance: "{identifier}!", samples: ["a {identifier} cat"]}
    overrides: {adapter: {rank: 2}}
""",
    )
    fleet = load_fleet(path)
    rex, tom = fleet.subjects
    assert fleet.base == "pocket"
    assert [image.name for image in rex.images] == ["a.png", "b.jpg"]
    assert rex.train.optimizer.learning_rate == 1e-4
    assert (rex.train.num_train_steps, tom.train.num_train_steps) == (30, 30)
    assert rex.instance_prompt == "a photo of sks dog"
    assert rex.class_prompt == "a photo of a dog"
    assert (tom.instance_prompt, tom.sample_prompts, tom.seed) == ("zwx!", ("a zwx cat",), 7)
    assert (rex.train.adapter.rank, tom.train.adapter.rank) == (4, 2)


def test_yaml_is_1_2(tmp_path: Path) -> None:
    path = write_fleet(tmp_path, TRAIN + "subjects: [{id: no, class_noun: no, images: photos/rex}]")
    (subject,) = load_fleet(path).subjects
    assert (subject.subject_id, subject.class_noun) == ("no", "no")


def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    path = write_fleet(
        tmp_path,
        TRAIN
        + """
subjects:
  - {id: rex, class_noun: dog, images: photos/rex}
  - {id: rex, images: photos/nowhere}
  - {id: tom, class_noun: cat, images: photos/rex, overrides: {num_train_steps: 0, rank: 4}}
""",
    )
    with pytest.raises(InputProblems) as caught:
        load_fleet(path)
    text = str(caught.value)
    assert "'rex' is not unique" in text
    assert "'rex' has no class_noun" in text
    assert "photos/nowhere" in text
    assert "'tom': num_train_steps" in text
    assert "'tom': rank is not a known key" in text
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("subjects: []", "subjects"),
        ("subjects: [{id: Rex, class_noun: dog, images: photos/rex}]", "subjects.0.id"),
        ("subjects: [{id: rex, class_noun: dog, images: 3}]", "subjects.0.images"),
        ("colour: red\nsubjects: [{id: rex, class_noun: dog, images: photos/rex}]", "colour"),
        ("train: nothing\nsubjects: [{id: rex, class_noun: dog, images: photos/rex}]", "nothing"),
        ("train: {prior: {num_images: 0}}\nsubjects: [{id: r, images: photos/rex}]", "loss_weight"),
        ("- 1", "mapping"),
    ],
)
def test_each_mistake_is_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(InputProblems, match=expected):
        load_fleet(write_fleet(tmp_path, text))


def test_files_that_are_not_yaml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_fleet(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_fleet(tmp_path / "bad.yaml")
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(ConfigError, match="not YAML"):
        load_fleet(tmp_path / "twice.yaml")


def test_a_job_is_named_by_what_decides_its_result(tmp_path: Path) -> None:
    text = TRAIN + "subjects: [{id: rex, class_noun: dog, images: photos/rex, overrides: {%s}}]"
    digests = {}
    for overrides in ("", "pack: {max_subjects: 2}", "num_train_steps: 9"):
        (subject,) = load_fleet(write_fleet(tmp_path, text % overrides)).subjects
        digests[overrides] = subject.digest("base")
    assert digests[""] == digests["pack: {max_subjects: 2}"] != digests["num_train_steps: 9"]
    (tmp_path / "photos/rex/a.png").write_bytes(b"another picture")
    (subject,) = load_fleet(tmp_path / "fleet.yaml").subjects
    assert subject.digest("base") != digests["num_train_steps: 9"]
    assert subject.digest("base") != subject.digest("another base")


def test_a_subject_with_learned_tokens_is_called_by_them(tmp_path: Path) -> None:
    text = """
defaults: {class_noun: dog, overrides: {adapter: {identifier_tokens: 2}}}
subjects:
  - {id: rex, images: photos/rex}
"""
    (subject,) = load_fleet(write_fleet(tmp_path, TRAIN + text)).subjects
    assert subject.instance_prompt == "a photo of <rex> dog"
    named = text.replace("images:", "identifier: sks, images:")
    with pytest.raises(InputProblems, match="identifier has no effect with identifier_tokens"):
        load_fleet(write_fleet(tmp_path, TRAIN + named))
