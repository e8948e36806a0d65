"""Every objective and every kind of photograph: a pack is still its solo runs and the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.raybooth.training.jobs import draw_tensors, flatten, largest, make_job, relative, spoil
from tests.tiny import write_tiny_base

from raybooth.data.batch import make_slot_batches
from raybooth.errors import ConfigError
from raybooth.model.base import Base, load_base
from raybooth.training.job import SlotJob, SlotReport
from raybooth.training.pack import Pack
from raybooth.training.reference import train_subject
from raybooth.training.rows import RowLosses
from raybooth.training.wording import Wording

EXACT = 1e-10
SIZES = ((8, 8), (4, 8), (8, 4), (8, 8))
"""Latent (height, width) of the four photos."""
NO_IMAGES = {"kind": "base_prediction", "num_images": 0, "loss_weight": 0.7}


@pytest.fixture(scope="module")
def plain_velocity64(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """float64, v-prediction, a schedule that ends above zero SNR."""
    folder = write_tiny_base(
        tmp_path_factory.mktemp("base") / "plain", prediction_type="v_prediction", seed=2
    )
    return load_base(str(folder), dtype=torch.float64)


def photograph_job(name: str, seed: int = 0, **overrides: Any) -> SlotJob:
    """Photos of three shapes, two captions, masks, an embedding of the class prompt."""
    generator = torch.Generator().manual_seed(99)
    tensors = draw_tensors(name)
    mean_NCHW, std_NCHW = tensors.mean_NCHW.clone(), tensors.std_NCHW.clone()
    mask_NHW = torch.rand(mean_NCHW[:, 0].shape, generator=generator)
    for place, (height, width) in enumerate(SIZES):
        for padded in (mean_NCHW[place], std_NCHW[place], mask_NHW[place]):
            padded[..., height:, :] = 0.0
            padded[..., width:] = 0.0
    words, (key, row) = torch.randn(1, 77, 32, generator=generator), _only(tensors)
    own = replace(
        tensors,
        mean_NCHW=mean_NCHW,
        std_NCHW=std_NCHW,
        mask_NHW=mask_NHW,
        size_N=SIZES,
        prompt_N=(0, 1, 1, 0),
        instance_conditioning={key: torch.cat([row, words])},
        class_conditioning={key: torch.randn(1, 77, 32, generator=generator)},
    )
    return replace(make_job(name, seed, **overrides), tensors=own)


def _only(tensors: Any) -> tuple[str, torch.Tensor]:
    ((key, row),) = tensors.instance_conditioning.items()
    return key, row


def all_options(**objective: Any) -> list[SlotJob]:
    masks = {"masks": True, "background_weight": 0.25}
    return [
        photograph_job("robot", 0, photos=masks, prior=NO_IMAGES, batch_size=2),
        photograph_job("vase", 1, photos=masks, batch_size=3, objective={"snr_gamma": 5.0}),
        make_job("dog-1", 2, objective={"offset_noise": 0.1, **objective}, num_train_steps=4),
        photograph_job("cat", 3, prior={"num_images": 0, "loss_weight": 0.0}),
    ]


def trained(base: Base, jobs: list[SlotJob]) -> dict[str, tuple[torch.Tensor, list[SlotReport]]]:
    pack = Pack(base, jobs)
    reports: dict[str, list[SlotReport]] = {job.job_id: [] for job in jobs}
    while pack.active:
        for report in pack.step():
            reports[report.job_id].append(report)
    found = {job.job_id: (flatten(pack.adapter(job.job_id)), reports[job.job_id]) for job in jobs}
    pack.close()
    return found


def check_against_the_reference(base: Base, jobs: list[SlotJob]) -> None:
    together = trained(base, jobs)
    for job in jobs:
        flat, reports = together[job.job_id]
        alone, _ = trained(base, [job])[job.job_id]
        truth = train_subject(base, job.tensors, job.train, job.subject_id, job.seed)
        assert reports[-1].status == "finished"
        assert relative(flat, alone) <= EXACT
        assert relative(flat, flatten(truth.adapter)) <= EXACT
        assert largest([report.loss for report in reports], truth.losses) <= EXACT


def test_with_every_option_a_pack_is_its_solo_runs_and_the_reference(base64: Base) -> None:
    check_against_the_reference(base64, all_options(snr_gamma=1.0))


def test_velocity_bases_too_with_either_weight_and_zero_terminal_snr(
    plain_velocity64: Base,
) -> None:
    jobs = all_options(snr_gamma=5.0, velocity_weight="plus_one", zero_terminal_snr=True)
    check_against_the_reference(plain_velocity64, jobs)


@pytest.mark.parametrize(
    "change",
    [
        {"photos": {"masks": True}},
        {"photos": {"masks": True, "background_weight": 0.5}},
        {"prior": NO_IMAGES},
        {"objective": {"offset_noise": 0.1}},
        {"objective": {"snr_gamma": 5.0}},
        {"objective": {"snr_gamma": 5.0, "velocity_weight": "plus_one"}},
        {"objective": {"zero_terminal_snr": True}},
    ],
)
def test_every_option_has_an_effect(plain_velocity64: Base, change: dict[str, Any]) -> None:
    short: dict[str, Any] = {"num_train_steps": 2}
    plain, changed = photograph_job("robot", **short), photograph_job("robot", **short, **change)
    before = trained(plain_velocity64, [plain])[plain.job_id][0]
    assert relative(trained(plain_velocity64, [changed])[plain.job_id][0], before) > 1e-6


def test_parts_of_different_sizes_sum_to_one_loss(base64: Base) -> None:
    """Each slot's means run over all of its rows, however they fall into sizes."""
    job = photograph_job("robot", batch_size=4)
    pack = Pack(base64, [job])
    batches = make_slot_batches(
        job.tensors,
        job.train,
        job.subject_id,
        job.seed,
        0,
        num_train_timesteps=1000,
        scaling_factor=base64.scaling_factor,
        latent_dtype=torch.float64,
    )
    assert sorted(tuple(b.latents_BCHW.shape[2:]) for b in batches) == [(4, 8), (8, 4), (8, 8)]
    losses = RowLosses(base64, pack.bank, [job.train], Wording(base64, pack.bank, [job]))
    with torch.no_grad():
        total = sum(float(part.total_S[1]) for part in losses.parts([1], [batches]))
        each = [losses([1], [batch]) for batch in batches]
    pack.close()
    num_instance = [int((~batch.is_prior_B).sum()) for batch in batches]
    instance = sum(n * float(e.instance_S[1]) for n, e in zip(num_instance, each, strict=True)) / 4
    prior = sum(float(e.prior_S[1]) for e in each)  # all prior images are square: one part
    assert total == pytest.approx(instance + prior, rel=1e-12)


def test_the_null_adapter_is_the_teacher(base64: Base) -> None:
    """A fresh adapter predicts as the base does: nothing to keep yet; later there is."""
    job = photograph_job("robot", prior=NO_IMAGES)
    _, reports = trained(base64, [job])[job.job_id]
    assert reports[0].prior_loss < 1e-20
    assert reports[-1].prior_loss > 1e-8
    free = photograph_job("robot", prior={"num_images": 0, "loss_weight": 0.0})
    kept, moved = (trained(base64, [one])[job.job_id][0] for one in (job, free))
    assert relative(kept, moved) > 1e-3


def test_base_prediction_reads_no_prior(base64: Base) -> None:
    job = photograph_job("robot", prior=NO_IMAGES)
    without = replace(job, tensors=replace(job.tensors, prior=None))
    one, other = (trained(base64, [each])[job.job_id][0] for each in (job, without))
    assert torch.equal(one, other)


def test_pixels_outside_of_the_mask_do_not_matter(base64: Base) -> None:
    job = photograph_job("robot", photos={"masks": True}, prior={"num_images": 0, "loss_weight": 0})
    half_NHW = torch.zeros_like(job.tensors.mean_NCHW[:, 0])
    half_NHW[:, :, :2] = 1.0
    job = replace(job, tensors=replace(job.tensors, mask_NHW=half_NHW))
    options: dict[str, Any] = {"num_train_timesteps": 1000, "scaling_factor": 1.0}
    (batch,) = make_slot_batches(job.tensors, job.train, "robot", 0, 0, **options)
    assert batch.weight_BHW is not None
    assert (batch.weight_BHW[..., 2:] == 0).all()
    assert batch.weight_BHW.mean() == pytest.approx(1.0)


def test_a_nan_stays_in_its_slot_with_every_option(base64: Base) -> None:
    jobs = all_options()
    whole, spoilt = trained(base64, jobs), trained(base64, [jobs[0], spoil(jobs[1]), *jobs[2:]])
    assert spoilt[jobs[1].job_id][1][-1].status == "failed"
    for job in (jobs[0], jobs[2], jobs[3]):
        assert relative(spoilt[job.job_id][0], whole[job.job_id][0]) <= EXACT


def test_interrupted_and_in_another_pack_it_is_the_same_to_the_bit(base64: Base) -> None:
    robot, vase = all_options()[:2]
    whole = trained(base64, [robot])[robot.job_id][0]
    pack = Pack(base64, [robot])
    for _ in range(3):
        pack.step()
    state = pack.state(robot.job_id)
    pack.close()
    pack = Pack(base64, [robot], states={robot.job_id: state})
    while pack.active:
        pack.step()
    assert torch.equal(flatten(pack.adapter(robot.job_id)), whole)
    pack.close()
    pack = Pack(base64, [vase, robot], states={robot.job_id: state})
    while robot.job_id in pack.active:
        pack.step()
    assert relative(flatten(pack.adapter(robot.job_id)), whole) <= EXACT
    pack.close()


def test_gradient_checkpointing_runs_each_size_through_its_own_slots(base64: Base) -> None:
    job = photograph_job("robot", batch_size=4, prior=NO_IMAGES)
    again = photograph_job("robot", batch_size=4, prior=NO_IMAGES, gradient_checkpointing=True)
    one, other = (trained(base64, [each])[job.job_id][0] for each in (job, again))
    assert relative(one, other) <= EXACT


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"zero_terminal_snr": True}, "zero_terminal_snr cannot be trained"),
        ({"snr_gamma": 5, "velocity_weight": "plus_one"}, "velocity_weight: plus_one has no"),
    ],
)
def test_options_of_velocity_bases_are_refused_elsewhere(
    base: Base, objective: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        Pack(base, [make_job("robot", objective=objective)])


def test_zero_terminal_snr_of_a_base_that_has_it_is_refused(velocity64: Base) -> None:
    with pytest.raises(ConfigError, match="has no effect"):
        Pack(velocity64, [make_job("robot", objective={"zero_terminal_snr": True})])
