"""Packs of an SDXL base: words, pooled words and sizes reach the rows that they belong to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.raybooth.training.jobs import flatten, largest, relative
from tests.tiny import write_tiny_sdxl

from raybooth.config import TrainConfig
from raybooth.data.batch import make_slot_batches
from raybooth.data.encode import SubjectTensors, encode_subject
from raybooth.data.prior import PriorCache, prior_key
from raybooth.data.prior_build import build_prior
from raybooth.model.base import Base, encode_prompts, load_base
from raybooth.model.lora import AdapterTensors
from raybooth.subject import Subject
from raybooth.training.job import SlotJob
from raybooth.training.pack import Pack
from raybooth.training.wording import Wording

SIZES = {"rex": (56, 40), "bella": (36, 72)}
"""Width and height of each subject's photos."""

TRAIN = {
    "resolution": 32,
    "num_train_steps": 2,
    "batch_size": 2,
    "adapter": {"rank": 2},
    "optimizer": {"learning_rate": 1e-3},
    "prior": {"num_images": 3, "loss_weight": 1.0, "num_inference_steps": 2, "solver": "ddim"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(str(folder))


@pytest.fixture(scope="module")
def jobs(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[SlotJob]:
    """Two subjects of one class, encoded from photos, their prior made by the base."""
    root = tmp_path_factory.mktemp("subjects")
    priors, train = PriorCache(root / "priors"), TrainConfig.model_validate(TRAIN)
    key = prior_key(train, "a photo of a dog", base.fingerprint)
    build_prior(base, priors, key, train.prior.num_images)
    found = []
    for seed, (subject_id, size) in enumerate(SIZES.items()):
        photos = tuple(root / f"{subject_id}-{place}.png" for place in range(3))
        for place, photo in enumerate(photos):
            Image.effect_noise(size, 40.0 + 20.0 * place).convert("RGB").save(photo)
        subject = Subject(subject_id, "dog", "sks", photos, train)
        tensors = encode_subject(base, subject, root / "encoded", priors=priors)
        words = ("dog", "a photo of a dog")
        found.append(SlotJob(f"{subject_id}-job", subject_id, seed, train, tensors, *words))
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_each_row_has_its_own_words_and_sizes(
    base: Base, jobs: list[SlotJob], batch_size: int
) -> None:
    """diffusers' SDXL script gives class prompts to instance images from batch size 2 on."""
    train = TrainConfig.model_validate({**TRAIN, "batch_size": batch_size})
    words = {
        is_prior: encode_prompts(base, [prompt])
        for is_prior, prompt in ((False, "a photo of sks dog"), (True, "a photo of a dog"))
    }
    for job in jobs:
        tensors = _certain(job.tensors)
        (rows,) = make_slot_batches(
            tensors, train, job.subject_id, 0, 1, num_train_timesteps=1000, scaling_factor=1.0
        )
        assert rows.is_prior_B.tolist() == [False] * batch_size + [True] * batch_size
        assert tensors.prior is not None
        images = {False: tensors.mean_NCHW, True: tensors.prior.mean_NCHW}
        for place, is_prior in enumerate(rows.is_prior_B.tolist()):
            latents_CHW = rows.latents_BCHW[place]
            assert any(torch.equal(latents_CHW, image_CHW) for image_CHW in images[is_prior])
            for name, tensor in words[is_prior].items():
                assert torch.equal(rows.conditioning[name][place], tensor[0])
            sizes = rows.conditioning["time_ids"][place].tolist()
            width, height = SIZES[job.subject_id]
            assert sizes[:2] == ([32, 32] if is_prior else [height, width])
            assert sizes[4:] == [32, 32]
            assert (sizes[2:4] == [0, 0]) == is_prior


@pytest.mark.parametrize(
    "adapter",
    [{"rank": 2}, {"rank": 2, "text_targets": "attention", "identifier_tokens": 1}],
    ids=["denoiser", "both text encoders and a learned identifier"],
)
def test_a_pack_of_two_is_two_solo_runs(
    folder: Path, jobs: list[SlotJob], adapter: dict[str, Any]
) -> None:
    base = load_base(str(folder), dtype=torch.float64)
    for encoder in base.text_encoders.values():
        encoder.double()
    train = TrainConfig.model_validate({**TRAIN, "adapter": adapter})
    jobs = [replace(job, train=train) for job in jobs]
    adapters, losses = _train(base, jobs)
    for job in jobs:
        alone, own_losses = _train(base, [job])
        assert flatten(alone[job.job_id]).norm() > 0
        assert relative(flatten(adapters[job.job_id]), flatten(alone[job.job_id])) <= 1e-10
        assert largest(losses[job.job_id], own_losses[job.job_id]) <= 1e-10
        assert len(own_losses[job.job_id]) == 2


def test_sizes_are_not_rounded_in_low_precision(folder: Path, jobs: list[SlotJob]) -> None:
    base = load_base(str(folder), dtype=torch.bfloat16)
    time_ids = torch.tensor([[1021.0, 683.0, 0.0, 347.0, 32.0, 32.0]])
    tensors = replace(jobs[0].tensors, size_conditioning={"time_ids": time_ids.expand(3, 6)})
    train = TrainConfig.model_validate({**TRAIN, "precision": "bf16"})
    job = replace(jobs[0], tensors=tensors, train=train)
    pack = Pack(base, [job])
    rows = make_slot_batches(
        tensors, train, "rex", 0, 0, num_train_timesteps=1000, scaling_factor=1.0
    )
    cond = Wording(base, pack.bank, [job]).cached(rows)
    pack.close()
    assert torch.equal(cond["time_ids"][:2], time_ids.expand(2, 6))


def _train(
    base: Base, jobs: list[SlotJob]
) -> tuple[dict[str, AdapterTensors], dict[str, list[float]]]:
    pack = Pack(base, jobs)
    losses: dict[str, list[float]] = {job.job_id: [] for job in jobs}
    while pack.active:
        for report in pack.step():
            losses[report.job_id].append(report.loss)
    adapters = {job.job_id: pack.adapter(job.job_id) for job in jobs}
    pack.close()
    return adapters, losses


def _certain(tensors: SubjectTensors) -> SubjectTensors:
    """Without the posterior's spread: latents are their means."""
    assert tensors.prior is not None
    prior = replace(tensors.prior, std_NCHW=torch.zeros_like(tensors.prior.std_NCHW))
    return replace(tensors, std_NCHW=torch.zeros_like(tensors.std_NCHW), prior=prior)
