"""Prior images against base prediction against no prior: likeness, drift and seconds.

`python -m tests.bench.base_prediction`: drawn subjects on the pocket base, its own evaluators.
Likeness is `dino` (cosine of samples with the photos; higher is nearer). Drift is 1 - the cosine of
each class picture with the base's own of the same seed (lower forgets less); `pres` is as in the
DreamBooth paper (cosine of class pictures with the photos; lower leaks less). Seconds are those of
this process's CPU time, which other work on the machine moves least.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raybooth.config import TrainConfig, find_config, load_yaml, merge
from raybooth.data.encode import encode_subject
from raybooth.data.images import load_photo
from raybooth.data.prior import PriorCache
from raybooth.data.prior_build import build_prior
from raybooth.data.prior_key import prior_key
from raybooth.encoders import Encoders, load_encoders
from raybooth.evaluation import Sampling, Words, draw, score
from raybooth.model.base import Base, load_base
from raybooth.pocket import world
from raybooth.subject import Subject
from raybooth.training.job import SlotJob
from raybooth.training.pack import Pack

CLASSES = ("robot", "fish", "house", "car")
PRIORS: dict[str, dict[str, Any]] = {
    "prior images": {},
    "base prediction": {"prior": {"kind": "base_prediction"}},
    "no prior": {"prior": {"num_images": 0, "loss_weight": 0.0}},
}
_OF_IMAGES = ("num_images", "guidance_scale", "num_inference_steps")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One subject under one kind of prior."""

    likeness: float
    drift: float
    pres: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--subjects", type=int, default=len(CLASSES))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base, judges = load_base("pocket"), load_encoders()
    print(f"{options.subjects} subjects in one pack, {options.steps} train steps each\n")
    print("| | likeness | drift | pres | prior CPU s | train CPU s |")
    print("|---|---|---|---|---|---|")
    for name in PRIORS:
        with tempfile.TemporaryDirectory() as folder:
            subjects = _subjects(Path(folder), name, options.subjects, options.steps)
            jobs, prior_s = _encode(base, subjects, Path(folder))
            outcomes, train_s = _train(base, subjects, jobs, judges)
        likeness, drift, pres = (
            statistics.mean(getattr(outcome, figure) for outcome in outcomes)
            for figure in ("likeness", "drift", "pres")
        )
        figures = f"{likeness:.3f} | {drift:.4f} | {pres:.3f} | {prior_s:.1f} | {train_s:.1f}"
        print(f"| {name} | {figures} |", flush=True)
    return 0


def _subjects(folder: Path, name: str, count: int, steps: int) -> list[Subject]:
    values: Any = load_yaml(find_config("train", "pocket-lora"))
    if name != "prior images":
        for option in _OF_IMAGES:
            values["prior"].pop(option)
    train = TrainConfig.model_validate(
        merge(merge(values, PRIORS[name]), {"num_train_steps": steps})
    )
    subjects = []
    for index, noun in enumerate(CLASSES[:count]):
        instance = world.draw_instance(200 + index, noun, fancy=True)
        paths = []
        for place, photo in enumerate(world.subject_photos(instance, 5, index)):
            paths.append(folder / f"{noun}-{place}.png")
            photo.save(paths[-1])
        subjects.append(Subject(f"{noun}-{index}", noun, "sks", tuple(paths), train))
    return subjects


def _encode(base: Base, subjects: list[Subject], folder: Path) -> tuple[list[SlotJob], float]:
    """Jobs, and the CPU seconds that their prior images took."""
    priors, start = PriorCache(folder / "priors"), time.process_time()
    for subject in subjects:
        if subject.train.prior.num_images:
            key = prior_key(subject.train, subject.class_prompt, base.fingerprint)
            build_prior(base, priors, key, subject.train.prior.num_images)
    prior_s = time.process_time() - start
    jobs = []
    for subject in subjects:
        tensors = encode_subject(base, subject, folder / "encoded", priors=priors)
        jobs.append(
            SlotJob(
                job_id=subject.subject_id,
                subject_id=subject.subject_id,
                seed=subject.seed,
                train=subject.train,
                tensors=tensors,
                class_prompt=subject.class_prompt,
            )
        )
    return jobs, prior_s


def _train(
    base: Base, subjects: list[Subject], jobs: list[SlotJob], judges: Encoders
) -> tuple[list[Outcome], float]:
    pack, start = Pack(base, jobs), time.process_time()
    while pack.active:
        pack.step()
    train_s = time.process_time() - start
    outcomes = [
        _judge(base, pack, pack.slot(subject.subject_id), subject, judges) for subject in subjects
    ]
    pack.close()
    return outcomes, train_s


def _judge(base: Base, pack: Pack, slot: int, subject: Subject, judges: Encoders) -> Outcome:
    samples = subject.train.samples
    sampling = Sampling(
        prompts=samples.prompts,
        class_prompt=subject.train.class_prompt,
        images_per_prompt=2,
        class_images=8,
        solver=samples.solver,
        num_inference_steps=samples.num_inference_steps,
        guidance_scale=samples.guidance_scale,
        side=subject.train.resolution,
    )
    words = Words(subject.identifier, subject.class_noun)
    own = draw(base, pack.bank, slot, words, sampling)
    of_base = draw(base, pack.bank, 0, words, sampling)
    photos = [load_photo(path) for path in subject.images]
    scores = score(judges, photos, own, [words.plain(prompt) for prompt in samples.prompts])
    own_PD, base_PD = judges.image.embed(own.of_class), judges.image.embed(of_base.of_class)
    drift = float((1.0 - (own_PD * base_PD).sum(1)).mean())
    return Outcome(scores.dino, drift, scores.pres or 0.0)


if __name__ == "__main__":
    sys.exit(main())
