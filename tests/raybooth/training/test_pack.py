"""A pack of N is N solo runs (equivalence 2); who fails, finishes or leaves, does so alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.raybooth.training.jobs import (
    flatten,
    four_jobs,
    largest,
    make_job,
    relative,
    spoil,
)
from torch import Tensor

from raybooth.errors import ConfigError
from raybooth.model.base import Base, load_base
from raybooth.model.sampler import SampleRequest, generate
from raybooth.training.job import SlotJob, SlotReport
from raybooth.training.pack import Pack
from raybooth.training.reference import train_subject

EXACT = 1e-10
"""fp64: pack against solo."""
CLOSE = 1e-4
"""fp32: pack against solo, relative L2."""


class Run:
    """All reports and adapters of jobs trained together to their ends."""

    def __init__(self, base: Base, jobs: Sequence[SlotJob]) -> None:
        pack = Pack(base, jobs)
        self.reports: dict[str, list[SlotReport]] = {job.job_id: [] for job in jobs}
        while pack.active:
            for report in pack.step():
                self.reports[report.job_id].append(report)
        self.adapters = {job.job_id: pack.adapter(job.job_id) for job in jobs}
        self.flat_SP = pack.bank.flat_SP.detach().clone()
        pack.close()

    def flat(self, job: SlotJob) -> Tensor:
        return flatten(self.adapters[job.job_id])

    def losses(self, job: SlotJob) -> list[float]:
        return [report.loss for report in self.reports[job.job_id]]

    def norms(self, job: SlotJob) -> list[float]:
        return [report.grad_norm for report in self.reports[job.job_id]]


@pytest.mark.parametrize("kind", ["base64", "velocity64"])
def test_a_pack_of_four_is_four_solo_runs_in_fp64(
    kind: str, request: pytest.FixtureRequest
) -> None:
    base: Base = request.getfixturevalue(kind)
    jobs = four_jobs()
    together = Run(base, jobs)
    for job in jobs:
        alone = Run(base, [job])
        assert relative(together.flat(job), alone.flat(job)) <= EXACT
        assert largest(together.losses(job), alone.losses(job)) <= EXACT
        assert largest(together.norms(job), alone.norms(job)) <= EXACT
        assert len(together.losses(job)) == job.train.num_train_steps
        assert together.reports[job.job_id][-1].status == "finished"


@pytest.mark.parametrize("kind", ["base64", "velocity64"])
def test_a_pack_of_four_is_the_reference_in_fp64(kind: str, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(kind)
    jobs = four_jobs()
    together = Run(base, jobs)
    for job in jobs:
        truth = train_subject(base, job.tensors, job.train, job.subject_id, job.seed)
        assert relative(together.flat(job), flatten(truth.adapter)) <= EXACT
        assert largest(together.losses(job), truth.losses) <= EXACT
        assert largest(together.norms(job), truth.grad_norms) <= EXACT


def test_a_pack_of_four_is_four_solo_runs_and_the_reference_in_fp32(base: Base) -> None:
    jobs = four_jobs()
    together = Run(base, jobs)
    for job in jobs:
        alone = Run(base, [job])
        truth = train_subject(base, job.tensors, job.train, job.subject_id, job.seed)
        assert relative(together.flat(job), alone.flat(job)) <= CLOSE
        assert relative(together.flat(job), flatten(truth.adapter)) <= CLOSE
        assert largest(together.losses(job), alone.losses(job)) <= CLOSE


def test_training_moves_every_subject_its_own_way(base: Base) -> None:
    jobs = [make_job("robot"), make_job("vase")]
    run = Run(base, jobs)
    other_seed = Run(base, [make_job("robot", seed=1)]).flat(jobs[0])
    assert relative(run.flat(jobs[0]), run.flat(jobs[1])) > 0.1
    assert relative(run.flat(jobs[0]), other_seed) > 0.1
    assert all((pair.up != 0).any() for pair in run.adapters[jobs[0].job_id].values())


def test_slots_leave_with_zero_padding_and_an_untouched_null_adapter(base: Base) -> None:
    jobs = four_jobs()
    run = Run(base, jobs)
    assert (run.flat_SP[0] == 0).all()
    for slot, job in enumerate(jobs, 1):
        own = sum(
            part.count_nonzero() for pair in run.adapters[job.job_id].values() for part in pair
        )
        assert run.flat_SP[slot].count_nonzero() == own


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_nan_fails_its_own_job_and_neighbours_do_not_notice(
    precision: str, base: Base, base64: Base
) -> None:
    jobs = four_jobs(precision=precision)
    exact = precision == "fp32"
    chosen = base64 if exact else base
    run = Run(chosen, [jobs[0], spoil(jobs[1]), jobs[2], jobs[3]])
    failed = run.reports[jobs[1].job_id][-1]
    assert failed.status == "failed"
    assert "nan" in str(failed.error)
    assert f"train step {failed.train_step}" in str(failed.error)
    assert torch.isfinite(run.flat_SP).all()
    for job in (jobs[0], jobs[2], jobs[3]):
        assert run.reports[job.job_id][-1].status == "finished"
    for job in (jobs[0], jobs[3]):
        alone = Run(chosen, [job])
        assert relative(run.flat(job), alone.flat(job)) <= (EXACT if exact else 0.05)


def test_a_neighbours_nan_changes_no_bit_of_the_step(base: Base) -> None:
    """At one batch size, the rows of the others are the same numbers with or without it."""
    robot, vase, cat = make_job("robot"), make_job("vase"), make_job("cat")
    spoilt, whole = Pack(base, [robot, spoil(vase), cat]), Pack(base, [robot, vase, cat])
    whole.bank.detach()
    while len(spoilt.active) == 3:
        found = spoilt.step()
    spoilt.close()
    whole.bank.attach()
    for _ in range(found[0].train_step):
        expected = whole.step()
    whole.close()
    assert found[1].status == "failed"
    assert [found[0], found[2]] == [expected[0], expected[2]]
    kept = torch.tensor([1, 3])
    flats = [pack.bank.flat_SP.detach()[kept] for pack in (spoilt, whole)]
    assert torch.equal(flats[0], flats[1])


def test_a_cancelled_job_leaves_and_its_neighbour_goes_on(base64: Base) -> None:
    jobs = [make_job("robot"), make_job("vase")]
    pack = Pack(base64, jobs)
    for _ in range(2):
        pack.step()
    before = flatten(pack.adapter(jobs[1].job_id))
    report = pack.cancel(jobs[1].job_id)
    assert (report.status, report.train_step) == ("cancelled", 2)
    assert pack.active == (jobs[0].job_id,)
    while pack.active:
        assert [report.job_id for report in pack.step()] == [jobs[0].job_id]
    assert torch.equal(flatten(pack.adapter(jobs[1].job_id)), before)
    found = flatten(pack.adapter(jobs[0].job_id))
    pack.close()
    assert relative(found, Run(base64, jobs[:1]).flat(jobs[0])) <= EXACT


def test_the_bank_leaves_the_denoiser(base: Base) -> None:
    latents, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    context = torch.randn(1, 77, 32)
    before = base.denoiser(latents, t, encoder_hidden_states=context).sample
    Run(base, [make_job("robot")])
    after = base.denoiser(latents, t, encoder_hidden_states=context).sample
    assert torch.equal(before, after)


def test_8bit_states_learn_as_32bit_ones_do(base: Base) -> None:
    """Not the same numbers: the moments have 8 bits. They go the same way as far."""
    jobs = [
        make_job("robot", optimizer={"name": name}, num_train_steps=8)
        for name in ("adamw", "adamw8bit")
    ]
    fresh = Pack(base, [jobs[0]])
    start = flatten(fresh.adapter(jobs[0].job_id))
    fresh.close()
    moves = [Run(base, [job]).flat(job) - start for job in jobs]
    cosine = torch.nn.functional.cosine_similarity(moves[0], moves[1], dim=0)
    assert cosine > 0.9
    assert 0.8 < (moves[1].norm() / moves[0].norm()) < 1.25


def test_an_8bit_slot_does_not_notice_its_neighbours(base: Base) -> None:
    """Also not a neighbour of higher rank, which widens the bank's rows."""
    eight = make_job("robot", optimizer={"name": "adamw8bit"})
    neighbours = [make_job("vase", adapter={"rank": 8}), make_job("cat", batch_size=2)]
    together, alone = Run(base, [eight, *neighbours]), Run(base, [eight])
    # 8-bit moments round: a last-bit difference of a gradient may move a state by one code
    assert relative(together.flat(eight), alone.flat(eight)) <= 1e-3
    assert largest(together.losses(eight)[:2], alone.losses(eight)[:2]) <= CLOSE


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("loaded", ["fp32", "low"])
def test_low_precision_follows_fp32(
    precision: str, loaded: str, base: Base, tiny_folder: Path
) -> None:
    """Whether the base is loaded in the low precision or cast call by call."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    low_base = base if loaded == "fp32" else load_base(str(tiny_folder), dtype=dtype)
    jobs = [make_job("robot", precision=kind) for kind in ("fp32", precision)]
    full, low = Run(base, [jobs[0]]), Run(low_base, [jobs[1]])
    assert largest(low.losses(jobs[1]), full.losses(jobs[0])) <= 0.03
    assert low.flat_SP.dtype == torch.float32


def test_fp16_overflow_skips_that_slots_step_and_halves_its_scale_alone(base: Base) -> None:
    jobs = [make_job("robot", precision="fp16"), make_job("vase", precision="fp16")]
    pack = Pack(base, jobs)
    state = pack.state(jobs[1].job_id)
    pack.close()
    huge = {jobs[1].job_id: replace(state, loss_scale=2.0**40)}
    pack = Pack(base, jobs, states=huge)
    before = flatten(pack.adapter(jobs[1].job_id))
    reports = pack.step()
    assert reports[1].status == "running"
    assert reports[1].learning_rate == 0.0
    assert not math.isfinite(reports[1].grad_norm)
    assert torch.equal(flatten(pack.adapter(jobs[1].job_id)), before)
    after = pack.state(jobs[1].job_id)
    assert (after.loss_scale, after.opt_step, after.train_step) == (2.0**39, 0, 1)
    neighbour = pack.state(jobs[0].job_id)
    assert (neighbour.loss_scale, neighbour.opt_step) == (65536.0, 1)
    pack.close()


def test_fp16_scale_doubles_after_two_thousand_good_steps(base: Base) -> None:
    jobs = [make_job("robot", precision="fp16"), make_job("vase", precision="fp16")]
    pack = Pack(base, jobs)
    ready = replace(pack.state(jobs[0].job_id), good_steps=1999)
    pack.close()
    pack = Pack(base, jobs, states={jobs[0].job_id: ready})
    pack.step()
    after = [pack.state(job.job_id) for job in jobs]
    assert [state.loss_scale for state in after] == [131072.0, 65536.0]
    assert [state.good_steps for state in after] == [0, 1]
    pack.close()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_that_is_not_finite_fails_its_job_alone(precision: str, base: Base) -> None:
    """The loss is finite, its gradient overflows; fp16 has no loss scale left to halve."""
    sane = make_job("robot", precision=precision)
    wild = make_job("vase", precision=precision, prior={"loss_weight": 1e37})
    pack = Pack(base, [sane, wild])
    low = replace(pack.state(wild.job_id), loss_scale=1.0)
    pack.close()
    pack = Pack(base, [sane, wild], states={wild.job_id: low})
    before = flatten(pack.adapter(wild.job_id))
    reports = pack.step()
    assert [report.status for report in reports] == ["running", "failed"]
    assert math.isfinite(reports[1].loss)
    assert "the gradient is" in str(reports[1].error)
    assert torch.equal(flatten(pack.adapter(wild.job_id)), before)
    assert pack.active == (sane.job_id,)
    assert torch.isfinite(pack.bank.flat_SP).all()
    pack.close()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("precision", {"precision": "bf16"}),
        ("gradient_checkpointing", {"gradient_checkpointing": True}),
        ("resolution", {"resolution": 64}),
        ("adapter.targets", {"adapter": {"targets": "attention"}}),
    ],
)
def test_jobs_that_cannot_share_a_pack_are_refused(
    name: str, changes: dict[str, Any], base: Base
) -> None:
    with pytest.raises(ConfigError, match=f"share {name}"):
        Pack(base, [make_job("robot"), make_job("vase", **changes)])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_no_bit(precision: str, base: Base) -> None:
    """Blocks run again in backward with the hooks, routes and autocast of their first run."""
    plain = Run(base, four_jobs(precision=precision))
    checkpointed = Run(base, four_jobs(precision=precision, gradient_checkpointing=True))
    assert torch.equal(checkpointed.flat_SP, plain.flat_SP)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in base.denoiser.modules())


def test_no_job_and_one_job_twice_are_refused(base: Base) -> None:
    with pytest.raises(ConfigError, match="needs a job"):
        Pack(base, [])
    with pytest.raises(ConfigError, match="must differ"):
        Pack(base, [make_job("robot"), make_job("robot", seed=3)])


def test_sampling_between_train_steps_changes_no_bit(base: Base) -> None:
    """As publishing a finished neighbour does."""
    jobs = [make_job("robot"), make_job("vase", num_train_steps=2)]
    request = SampleRequest("a photo of sks robot", num_inference_steps=2, height=32, width=32)
    flats: list[Tensor] = []
    for sampled in (False, True):
        pack = Pack(base, jobs)
        while pack.active:
            pack.step()
            if sampled:
                generate(base, pack.bank, [replace(request, slot=pack.slot(jobs[1].job_id))])
        flats.append(pack.bank.flat_SP.detach().clone())
        pack.close()
    assert torch.equal(flats[0], flats[1])
