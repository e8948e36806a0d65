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
def test_tasks_find_what_one_process_finds_fail_alone_and_keep_what_is_done(
    ray_session: Any, tmp_path: Path, tiny_base: Path, folders: Folders
) -> None:
    rex, kit = tasks_of(tmp_path, tiny_base, folders, ["rex", "kit"])
    reports = tmp_path / "reports"
    told: list[int] = []
    failed = evaluate_on_cluster(
        [replace(kit, photos=()), rex], reports, can_grow=False, on_progress=told.append
    )
    assert failed.keys() == {"kit"}
    assert "the photos of kit@1 are needed" in failed["kit"]
    assert told == sorted(set(told))
    assert told[-1] <= SAMPLING.num_pictures == 5
    assert [path.name for path in reports.iterdir()] == [rex.report_name]
    found = json.loads((reports / rex.report_name).read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(evaluate(rex)))

    def die(drawn: int) -> None:
        if (reports / kit.report_name).exists():
            raise KeyboardInterrupt

    endless = replace(rex, sampling=replace(SAMPLING, num_inference_steps=900, side=64))
    with pytest.raises(KeyboardInterrupt):
        evaluate_on_cluster([endless, kit], reports, can_grow=False, on_progress=die)
    names = {path.name for path in reports.iterdir()}
    assert names == {rex.report_name, kit.report_name}
    json.loads((reports / kit.report_name).read_text(encoding="utf-8"))

    big = replace(rex, resources=ResourcesConfig(num_cpus=512))
    with pytest.raises(ClusterError, match="no node can evaluate rex@1, which asks 512 CPU"):
        evaluate_on_cluster([big], reports, can_grow=False, on_progress=die)
