"""Evaluations as Ray tasks find what one process finds; one that fails takes nobody with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.encoders import write_tiny_encoders
from tests.raybooth.fleet.fleets import Mailbox, pack_task, survey_of, write_fleet

from raybooth.config import ResourcesConfig
from raybooth.errors import ClusterError
from raybooth.evaluation import Sampling
from raybooth.fleet.evaluation import EvaluationTask, evaluate
from raybooth.fleet.evaluation_cluster import evaluate_on_cluster
from raybooth.fleet.task import Folders
from raybooth.fleet.worker import train_pack_fn
from raybooth.store import Store

SAMPLING = Sampling(
    prompts=("a {identifier} {class_noun}", "a red {identifier} {class_noun}"),
    class_prompt="a photo of a {class_noun}",
    images_per_prompt=2,
    class_images=1,
    num_inference_steps=2,
    side=32,
)


def tasks_of(tmp_path: Path, base: Path, folders: Folders, names: list[str]) -> list[Any]:
    """Each subject published, ready to be judged by tiny encoders."""
    survey = survey_of(write_fleet(tmp_path, base, {name: {} for name in names}), folders)
    train_pack_fn({"task": pack_task(survey, folders), "monitor": Mailbox()})
    image, clip = write_tiny_encoders(tmp_path / "encoders")
    return [
        EvaluationTask(
            folders.store,
            Store(folders.store).fetch(job.subject.subject_id),
            job.subject.images,
            SAMPLING,
            str(image),
            str(clip),
        )
        for job in survey.jobs
    ]


@pytest.mark.ray
def test_tasks_find_what_one_process_finds_and_fail_alone(
    ray_session: Any, tmp_path: Path, tiny_base: Path, folders: Folders
) -> None:
    rex, kit, gone = tasks_of(tmp_path, tiny_base, folders, ["rex", "kit", "gone"])
    gone = replace(gone, photos=())
    reports = tmp_path / "reports"
    told: list[int] = []
    failed = evaluate_on_cluster([gone, rex, kit], reports, can_grow=False, on_progress=told.append)
    assert failed.keys() == {"gone"}, failed
    assert "the photos of gone@1 are needed" in failed["gone"]
    assert told == sorted(told)
    assert told[-1] <= 2 * SAMPLING.num_pictures == 2 * 5
    assert {path.name for path in reports.iterdir()} == {rex.report_name, kit.report_name}
    for task in (rex, kit):
        found = json.loads((reports / task.report_name).read_text(encoding="utf-8"))
        assert found == json.loads(json.dumps(evaluate(task)))


@pytest.mark.ray
def test_what_is_done_is_kept_when_the_caller_dies(
    ray_session: Any, tmp_path: Path, tiny_base: Path, folders: Folders
) -> None:
    (task,) = tasks_of(tmp_path, tiny_base, folders, ["rex"])
    endless = replace(task, sampling=replace(SAMPLING, num_inference_steps=900, side=64))
    reports = tmp_path / "reports"

    def die(drawn: int) -> None:
        if (reports / task.report_name).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_on_cluster([endless, task], reports, can_grow=False, on_progress=die)
    assert [path.name for path in reports.iterdir()] == [task.report_name]
    json.loads((reports / task.report_name).read_text(encoding="utf-8"))

    big = replace(task, resources=ResourcesConfig(num_cpus=512))
    with pytest.raises(ClusterError, match="no node can evaluate rex@1, which asks 512 CPU"):
        evaluate_on_cluster([big], reports, can_grow=False, on_progress=told_nothing)


def told_nothing(drawn: int) -> None:
    """Nothing was drawn."""
    raise AssertionError(drawn)
