"""Full runs: the published step, every cell of the matrix, W workers as one, exact resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.raybooth.training.full_jobs import (
    CLASS_PROMPT,
    TWO_WORKERS,
    fresh,
    full_job,
    losses_of,
    one_process_group,
)
from tests.raybooth.training.jobs import spoil
from tests.raybooth.training.test_rows import photograph_job
from tests.tiny import write_tiny_base, write_tiny_sdxl
from torch import Tensor

from raybooth.config import merge
from raybooth.data.batch import make_slot_batch
from raybooth.errors import CheckpointError, ConfigError, TrainingError
from raybooth.model.base import Base, encode_prompts, load_base
from raybooth.model.full_weights import load_full, save_full, trained_parts
from raybooth.training import objective
from raybooth.training.full import FullRun
from raybooth.training.full_loop import train_full
from raybooth.training.full_matrix import Cell, cell_of, cells, reason_against
from raybooth.training.full_rows import split
from raybooth.training.full_state import load_full_state
from raybooth.training.pack import Pack

SUPPORTED = [cell for cell in cells() if reason_against(cell, "cpu") is None]
Weights = dict[str, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _alone() -> None:
    one_process_group()


def cell_job(cell: Cell, **overrides: Any) -> Any:
    full = {
        "zero_stage": cell.zero_stage,
        "offload": cell.offload,
        "text_encoder": cell.text_encoder,
    }
    values = {"full": full, "optimizer": {"name": cell.optimizer}}
    return full_job(**merge(values, overrides))


def flat(weights: Weights) -> Tensor:
    return torch.cat([value.flatten() for part in weights.values() for value in part.values()])


def test_a_full_run_is_the_published_algorithm(base: Base) -> None:
    """Plain torch, whole batch at once: forward, two means, one clip over everything, AdamW."""
    job = full_job(full={"text_encoder": True}, optimizer={"max_grad_norm": 0.05})
    plain = fresh(base)
    parts = trained_parts(plain, text_encoder=True)
    parameters = [p.requires_grad_(True) for part in parts.values() for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)
    alpha_bar_T = objective.alphas_cumprod(base.scheduler_config)
    texts = plain.family.tokenize(plain.tokenizers, [*job.tensors.prompts, CLASS_PROMPT])
    losses = []
    for step in range(3):
        batch = make_slot_batch(
            job.tensors,
            job.train,
            job.subject_id,
            job.seed,
            step,
            num_train_timesteps=base.num_train_timesteps,
            scaling_factor=base.scaling_factor,
        )
        encoded = plain.family.condition(plain.text_encoders, texts)
        rows = [0, 0, 1, 1]
        conditioning = {name: value[rows] for name, value in encoded.items()}
        alpha_bar_B = alpha_bar_T[batch.timesteps_B]
        noisy = objective.add_noise(batch.latents_BCHW, batch.noise_BCHW, alpha_bar_B)
        predicted = plain.family.predict(plain.denoiser, noisy, batch.timesteps_B, conditioning)
        instance, prior = ((predicted - batch.noise_BCHW) ** 2).chunk(2)
        loss = instance.mean() + 0.7 * prior.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
        losses.append(loss.item())
    run = FullRun(fresh(base), job)
    assert [run.step().loss for _ in range(3)] == pytest.approx(losses, rel=1e-5)
    expected = flat({name: part.state_dict() for name, part in parts.items()})
    start = flat({n: p.state_dict() for n, p in trained_parts(base, text_encoder=True).items()})
    moved, found = expected - start, flat(run.weights()) - start
    assert float((found - moved).norm() / moved.norm()) < 2e-3
    run.close()


@pytest.mark.parametrize("cell", SUPPORTED, ids=str)
def test_a_supported_cell_trains_checkpoints_resumes_and_exports(
    cell: Cell, base: Base, tiny_folder: Path, tmp_path: Path
) -> None:
    job = cell_job(cell)
    assert cell_of(job.train) == cell
    whole = train_full(fresh(base), job, checkpoint_root=tmp_path / "whole")
    stops = iter([False, True])
    stopped = train_full(
        fresh(base),
        job,
        checkpoint_root=tmp_path / "halved",
        should_stop=lambda: next(stops),
    )
    assert stopped.weights is None
    again = train_full(fresh(base), job, checkpoint_root=tmp_path / "halved")
    assert whole.weights is not None
    assert again.weights is not None
    assert again.curve == whole.curve
    assert torch.equal(flat(again.weights), flat(whole.weights))
    save_full(tmp_path, whole.weights)
    exported = load_base(str(tiny_folder))
    load_full(exported, tmp_path, whole.weights)
    assert ("text_encoder" in whole.weights) == cell.text_encoder
    for part, module in trained_parts(exported, text_encoder=cell.text_encoder).items():
        own = trained_parts(base, text_encoder=True)[part].state_dict()
        for name, value in module.state_dict().items():
            assert torch.equal(value, whole.weights[part][name])
        moved = sum(not torch.equal(v, own[n]) for n, v in module.state_dict().items())
        assert moved > 0.9 * len(own)


def test_stages_accumulation_and_checkpointing_change_no_loss(base: Base) -> None:
    expected, norms = losses_of(base, full_job(full={"text_encoder": True}))
    for full in ({"zero_stage": 2, "gradient_accumulation": 3}, {"gradient_accumulation": 4}):
        curve, found = losses_of(base, full_job(full={"text_encoder": True, **full}))
        assert torch.tensor(curve) == pytest.approx(torch.tensor(expected), rel=1e-4)
        assert found == pytest.approx(norms, rel=1e-3)
    for stage in (0, 3):
        full = {"text_encoder": True, "zero_stage": stage}
        curve, _ = losses_of(base, full_job(full=full, gradient_checkpointing=True))
        assert torch.tensor(curve) == pytest.approx(torch.tensor(expected), rel=1e-4)


BOUND = 1e-4
"""Relative; the order of sums differs. bf16 rounds each row alike, 8-bit blocks fall otherwise."""
LOOSER = {2: 1e-2, 4: 2e-2}


def test_two_workers_lose_what_one_loses(base: Base, two_workers: Path) -> None:
    found, reason, resumed = torch.load(two_workers / "out")
    assert "a worker of this full run was lost" in reason
    for (curve, weights), (whole_curve, whole) in resumed:  # ZeRO 2 and 3: the bound is 0
        assert curve == whole_curve
        assert torch.equal(flat(weights), flat(whole))
    for place, (curve, norms) in enumerate(found):
        expected, alone = losses_of(base, full_job(**TWO_WORKERS[place]))
        bound = LOOSER.get(place, BOUND)
        assert torch.tensor(curve) == pytest.approx(torch.tensor(expected), rel=bound), place
        assert norms == pytest.approx(alone, rel=10 * bound), place


def test_shares_cover_every_row_once() -> None:
    job = full_job(batch_size=3)
    batch = make_slot_batch(
        job.tensors, job.train, "robot", 0, 0, num_train_timesteps=1000, scaling_factor=1.0
    )
    weight_B = torch.arange(1.0, 7.0)
    for shares in (1, 4, 8):
        parts = [split(batch, weight_B, batch.conditioning, n, shares) for n in range(shares)]
        weights = torch.cat([part.weight_B for part in parts])
        assert sorted(weights[weights > 0].tolist()) == weight_B.tolist()
        assert all(len(part.batch.latents_BCHW) == len(part.weight_B) > 0 for part in parts)


def test_a_loss_that_is_not_finite_ends_the_run_in_words(base: Base, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="loss of robot-job is not finite"):
        train_full(fresh(base), spoil(full_job()), checkpoint_root=tmp_path)


def test_damage_other_configs_and_full_disks_are_told(base: Base, tmp_path: Path) -> None:
    job = full_job(num_train_steps=4)
    train_full(fresh(base), job, checkpoint_root=tmp_path)
    folder = tmp_path / job.job_id
    newest = folder / "step-00000004-rank-0-unet.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = train_full(fresh(base), job, checkpoint_root=tmp_path)
    assert "train step 4" in again.notes[0]
    assert len(again.curve) == 4
    other = replace(job, train=job.train.model_copy(update={"batch_size": 1}))
    with pytest.raises(CheckpointError, match=r"train.batch_size 2 \(now 1\)"):
        train_full(fresh(base), other, checkpoint_root=tmp_path)
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match="cannot be written"):
        train_full(fresh(base), job, checkpoint_root=blocked)


def test_a_checkpoint_of_which_one_worker_lacks_its_part_is_passed_over(
    base: Base, tmp_path: Path
) -> None:
    job = full_job()
    train_full(fresh(base), job, checkpoint_root=tmp_path)
    folder = tmp_path / job.job_id
    (folder / "step-00000003-rank-0.safetensors").unlink()
    from raybooth.training.loop import job_fields

    state, notes = load_full_state(folder, job_fields(base, job))
    assert state is not None
    assert state.train_step == 2
    assert "worker 0" in notes[0]


def test_what_cannot_be_trained_here_is_refused(base: Base) -> None:
    job = full_job(optimizer={"name": "paged_adamw8bit"})
    with pytest.raises(ConfigError, match="unified memory"):
        FullRun(fresh(base), job)
    speechless = replace(job, tensors=replace(job.tensors, prompts=()))
    train = full_job(full={"text_encoder": True}).train
    with pytest.raises(ConfigError, match="text without words"):
        FullRun(fresh(base), replace(speechless, train=train))
    half = replace(base, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="float32 base"):
        FullRun(half, full_job())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_first_train_step_loses_what_a_pack_loses(
    kind: str, base: Base, tmp_path: Path
) -> None:
    """Sizes, captions, masks and the objective's options: a LoRA that has not moved is the base."""
    own, weights = base, {"snr_gamma": 5.0, "offset_noise": 0.1}
    if kind == "v_prediction":
        own = load_base(str(write_tiny_base(tmp_path / "base", prediction_type=kind)))
        weights |= {"velocity_weight": "plus_one", "zero_terminal_snr": True}
    options: dict[str, Any] = {
        "batch_size": 4,
        "photos": {"masks": True, "background_weight": 0.25},
        "objective": weights,
    }
    packed = photograph_job("robot", **options)
    pack = Pack(own, [packed])
    expected = pack.step()[0]
    pack.close()
    full = {"gradient_accumulation": 3, "zero_stage": 1}
    train = full_job(prior={"loss_weight": 1.0}, full=full, **options).train
    run = FullRun(fresh(own), replace(packed, train=train))
    found = run.step()
    run.close()
    for name in ("loss", "instance_loss", "prior_loss"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5)


def test_both_text_encoders_of_sdxl_are_trained(tmp_path: Path) -> None:
    """Pooled text with gradients, sizes beside the token ids, checkpointed blocks under ZeRO 3."""
    base = load_base(str(write_tiny_sdxl(tmp_path / "base")))
    sizes = base.family.size_conditioning((32, 32), (0, 0), (32, 32))
    full = {"text_encoder": True, "zero_stage": 3}
    job = full_job(full=full, num_train_steps=2, gradient_checkpointing=True)
    own, prior = job.tensors, job.tensors.prior
    assert prior is not None
    tensors = replace(
        own,
        instance_conditioning=encode_prompts(base, own.prompts),
        size_conditioning={name: row.repeat(len(own.mean_NCHW), 1) for name, row in sizes.items()},
        prior=replace(prior, conditioning={**encode_prompts(base, [CLASS_PROMPT]), **sizes}),
    )
    run = FullRun(fresh(base), replace(job, tensors=tensors))
    losses = [run.step().loss for _ in range(2)]
    weights = run.weights()
    run.close()
    assert all(loss > 0 for loss in losses)
    for part, module in trained_parts(base, text_encoder=True).items():
        before = module.state_dict()
        moved = sum(not torch.equal(value, before[name]) for name, value in weights[part].items())
        assert moved > 0.6 * len(before), part  # the last layer of the first encoder is unread
