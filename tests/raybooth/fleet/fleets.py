"""Small fleets for tests: the tiny base, drawn photos, few steps; and a mailbox without Ray."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tests.tiny import RESOLUTION

from raybooth.config import merge
from raybooth.data.prior import PriorCache
from raybooth.fleet.events import Monitor
from raybooth.fleet.planner import Resources
from raybooth.fleet.survey import Survey, survey_fleet
from raybooth.fleet.task import Folders, Member, PackTask

TRAIN: dict[str, Any] = {
    "resolution": RESOLUTION,
    "num_train_steps": 4,
    "adapter": {"rank": 2, "targets": "all"},
    "optimizer": {"learning_rate": 1e-3},
    "prior": {"num_images": 0, "loss_weight": 0},
    "checkpoint": {"every_steps": 1},
    "samples": {"prompts": ["a photo of {identifier} {class_noun}"], "num_inference_steps": 2},
}
WITH_PRIOR: dict[str, Any] = {"num_images": 2, "loss_weight": 1.0, "num_inference_steps": 2}


def draw_photos(folder: Path, seed: int, count: int = 3, side: int = 2 * RESOLUTION) -> Path:
    """`count` photos of coloured boxes."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(count):
        image = Image.new("RGB", (side, side), _color(rng))
        for _ in range(5):
            x, y = rng.randrange(side), rng.randrange(side)
            ImageDraw.Draw(image).rectangle((x, y, x + side // 2, y + side // 3), _color(rng))
        image.save(folder / f"{place}.png")
    return folder


def write_fleet(
    folder: Path,
    base: Path | str,
    subjects: Mapping[str, Mapping[str, Any]],
    train: Mapping[str, Any] | None = None,
) -> Path:
    """A fleet file with photos; each subject's mapping holds its overrides, `class_noun` apart."""
    entries = []
    for place, (subject_id, overrides) in enumerate(subjects.items()):
        draw_photos(folder / "photos" / subject_id, place)
        rest = dict(overrides)
        noun = rest.pop("class_noun", "dog")
        entry = {"id": subject_id, "class_noun": noun, "images": f"photos/{subject_id}"}
        entries.append({**entry, "overrides": rest})
    values = {"base": str(base), "train": merge(TRAIN, train or {}), "subjects": entries}
    path = folder / "fleet.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def survey_of(fleet: Path, folders: Folders) -> Survey:
    """The fleet, nothing wrong with it."""
    return survey_fleet(fleet, PriorCache(folders.priors))


def pack_task(survey: Survey, folders: Folders, subject_ids: Sequence[str] = ()) -> PackTask:
    """The subjects (all if none are named) as one pack."""
    members = [
        Member(job.job_id, job.subject)
        for job in survey.jobs
        if not subject_ids or job.subject.subject_id in subject_ids
    ]
    return PackTask(
        pack_id="pack-1",
        run_name="run-1",
        base=survey.fleet.base,
        revision=survey.fleet.revision,
        base_fingerprint=survey.base_fingerprint,
        members=tuple(members),
        resources=Resources(1.0),
        max_failures=1,
        folders=folders,
    )


class Mailbox:
    """The real monitor, called in this process as an actor's handle is."""

    def __init__(self) -> None:
        self.monitor = Monitor()

    def __getattr__(self, name: str) -> Any:
        return _Method(getattr(self.monitor, name))


class _Method:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def remote(self, *arguments: Any) -> _Answer:
        future: Future[Any] = Future()
        try:
            future.set_result(self._function(*arguments))
        except RuntimeError as error:
            future.set_exception(error)
        return _Answer(future)


class _Answer:
    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def future(self) -> Future[Any]:
        return self._future


def _color(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)
