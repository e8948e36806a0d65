"""Steps and whole trajectories of a pack are those of the published algorithm.

Relative bounds: losses 1e-6 and gradients 1e-5 in fp32 for one step; for twenty in fp64 1e-9, or
1e-6 for SDXL, whose size embedding diffusers computes in fp32 (it rounds by the number of rows).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raybooth.config import TrainConfig
from raybooth.data.batch import plan_batch, stream
from raybooth.data.encode import SubjectTensors
from raybooth.data.prior import PriorTensors
from raybooth.model.base import Base, encode_images, encode_prompts, load_base
from raybooth.training.job import SlotJob
from raybooth.training.pack import Pack
from tests.parity.published import Draws, Published
from tests.tiny import RESOLUTION, write_tiny_base, write_tiny_sdxl

INSTANCE, CLASS = "a photo of sks dog", "a photo of a dog"
SEED, SUBJECT = 7, "rex"
STEPS = 20


@pytest.fixture(scope="module", params=["sd", "sd-v", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity") / str(request.param)
    if request.param == "sdxl":
        return write_tiny_sdxl(folder)
    kind = "v_prediction" if request.param == "sd-v" else "epsilon"
    return write_tiny_base(folder, prediction_type=kind)


def draw_pixels(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, RESOLUTION, RESOLUTION, generator=generator) * 2 - 1


PHOTOS, PRIOR = draw_pixels(4, 1), draw_pixels(5, 2)


def make_train(batch_size: int, prior_weight: float | None, max_grad_norm: float) -> TrainConfig:
    prior: dict[str, Any] = {"num_images": 0, "loss_weight": 0}
    if prior_weight is not None:
        prior = {"num_images": len(PRIOR), "loss_weight": prior_weight}
    return TrainConfig.model_validate(
        {
            "resolution": RESOLUTION,
            "num_train_steps": STEPS,
            "batch_size": batch_size,
            "adapter": {"rank": 4, "targets": "attention"},
            "optimizer": {"learning_rate": 1e-3, "max_grad_norm": max_grad_norm},
            "prior": prior,
        }
    )


def make_pack(base: Base, train: TrainConfig) -> Pack:
    """The subject, and a neighbour of another seed whose presence must not be felt."""
    sizes = (RESOLUTION, RESOLUTION)
    time_ids = base.family.size_conditioning(sizes, (0, 0), sizes)
    prior = None
    if train.prior.num_images:
        conditioning = {**encode_prompts(base, [CLASS]), **time_ids}
        prior = PriorTensors(*encode_images(base, PRIOR), conditioning, ())
    tensors = SubjectTensors(
        *encode_images(base, PHOTOS),
        encode_prompts(base, [INSTANCE]),
        prior,
        (),
        size_conditioning={name: row.repeat(len(PHOTOS), 1) for name, row in time_ids.items()},
    )
    job = SlotJob("rex-job", SUBJECT, SEED, train, tensors)
    return Pack(base, [job, replace(job, job_id="other-job", subject_id="other", seed=1)])


def make_published(folder: Path, pack: Pack, train: TrainConfig, dtype: torch.dtype) -> Published:
    """With the pack's initial A; B starts at zero on both sides."""
    lr, rank = train.optimizer.learning_rate, train.adapter.rank
    published = Published(folder, rank=rank, lr=lr, dtype=dtype)
    for name, pair in pack.adapter("rex-job").items():
        down, up = published.pair(name)
        down.data.copy_(pair.down)
        assert not up.any()
        assert not pair.up.any()
    return published


def published_loss(published: Published, train: TrainConfig, train_step: int) -> Tensor:
    """The loss of the pictures and draws that the pack's own streams give this train step."""
    B, with_prior = train.batch_size, train.prior.num_images > 0
    plan = plan_batch(SEED, SUBJECT, train_step, B, len(PHOTOS), train.prior.num_images)
    pixels = PHOTOS[list(plan.instance_indices)]
    if with_prior:
        pixels = torch.cat([pixels, PRIOR[list(plan.prior_indices)]])
    channels = published.vae.config.latent_channels
    side = RESOLUTION // 2 ** (len(published.vae.config.block_out_channels) - 1)
    shape = (len(pixels), channels, side, side)

    def generator(purpose: str) -> torch.Generator:
        return stream(SEED, SUBJECT, train_step, purpose)

    draws = Draws(
        torch.randn(shape, generator=generator("vae")),
        torch.randn(shape, generator=generator("noise")),
        torch.randint(0, 1000, (len(pixels),), generator=generator("timestep")),
    )
    prompts = [INSTANCE, CLASS] if with_prior else [INSTANCE]
    weight = train.prior.loss_weight if with_prior else None
    return published.loss(pixels, draws, prompts, weight)


def flat(pairs: Mapping[str, tuple[Tensor, ...]]) -> Tensor:
    return torch.cat([part.detach().flatten() for pair in pairs.values() for part in pair])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("prior_weight", [None, 0.5, 1.0])
def test_a_step_is_the_published_one(
    folder: Path, batch_size: int, prior_weight: float | None
) -> None:
    train = make_train(batch_size, prior_weight, max_grad_norm=1e9)
    base = load_base(str(folder))
    pack = make_pack(base, train)
    published = make_published(folder, pack, train, torch.float32)
    for site in pack.bank.sites:  # a zero B would leave A without a gradient
        _, up = published.pair(site.name)
        up.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(site.name)))
    pairs = {s.name: published.pair(s.name) for s in pack.bank.sites}
    kind = type(next(iter(pack.adapter("rex-job").values())))
    pack.bank.write(1, {n: kind(d.detach(), u.detach()) for n, (d, u) in pairs.items()})
    loss = published_loss(published, train, 0)
    loss.backward()  # type: ignore[no-untyped-call]
    report = pack.step()[0]
    grad_SP = pack.bank.flat_SP.grad
    assert grad_SP is not None
    found = pack.bank.unflatten(grad_SP[1], train.adapter.rank)
    pack.close()
    assert report.loss == pytest.approx(loss.item(), rel=1e-6)
    ours = torch.cat([part.flatten() for n in pairs for part in found[n]])
    theirs = torch.cat([p.grad.flatten() for n in pairs for p in pairs[n] if p.grad is not None])
    assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize(("batch_size", "prior_weight"), [(1, None), (1, 1.0), (2, 0.5)])
def test_a_trajectory_is_the_published_one(
    folder: Path, batch_size: int, prior_weight: float | None
) -> None:
    """Twenty train steps with clipping at work, beside a neighbour."""
    bound = 1e-6 if folder.name == "sdxl" else 1e-9  # diffusers embeds SDXL's sizes in fp32
    train = make_train(batch_size, prior_weight, max_grad_norm=0.05)
    pack = make_pack(load_base(str(folder), dtype=torch.float64), train)
    published = make_published(folder, pack, train, torch.float64)
    start = flat(pack.adapter("rex-job"))
    clipped = 0
    for train_step in range(STEPS):
        report = pack.step()[0]
        loss = published_loss(published, train, train_step)
        published.step(loss, train.optimizer.max_grad_norm)
        assert report.loss == pytest.approx(loss.item(), rel=bound)
        clipped += report.grad_norm > train.optimizer.max_grad_norm
    adapter = pack.adapter("rex-job")
    pack.close()
    ours, theirs = flat(adapter), flat({name: published.pair(name) for name in adapter})
    assert relative(ours, theirs) <= bound
    assert relative(ours, start) > 1e-3
    assert clipped
