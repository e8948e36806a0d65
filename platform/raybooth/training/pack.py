"""Subjects trained together: one forward and one backward for all slots of one frozen base.

Shapes: B rows of a train step (all active slots, grouped by slot), S bank rows (0 is the null
adapter), P parameters of a bank row, N parameters of a slot in its own layout, C H W latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raybooth.config.adapter import learned_identifier
from raybooth.data.batch import SlotBatch, make_slot_batches, stream
from raybooth.errors import CheckpointError, ConfigError
from raybooth.model.bank import Bank
from raybooth.model.base import Base
from raybooth.model.learned import LearnedTokens, init_tokens, token_sites
from raybooth.model.lora import AdapterTensors, LoraPair, find_sites, find_text_sites
from raybooth.model.text_adapter import TextAdapter
from raybooth.training.checkpoint import SlotState, snapshot
from raybooth.training.job import SlotJob, SlotReport, Status
from raybooth.training.layout import SlotLayout
from raybooth.training.optim import SlotAdamW, SlotUpdate, clip_coefficient, lr_at
from raybooth.training.rows import RowLosses
from raybooth.training.wording import Wording

FIRST_LOSS_SCALE = 65536.0
GROWTH_STEPS = 2000
"""fp16: good train steps after which a slot's loss scale doubles."""


class Pack:
    """Jobs of one base, resolution, precision and targets; all else may differ by slot."""

    def __init__(
        self, base: Base, jobs: Sequence[SlotJob], *, states: Mapping[str, SlotState] | None = None
    ) -> None:
        """Fresh slots, or slots that go on from `states` (by job id).

        Raises ConfigError when the jobs cannot share a pack, CheckpointError when a state does
        not fit its job.
        """
        _check(base, jobs)
        first = jobs[0].train
        self._base = base
        self._precision = first.precision
        self._checkpoint_blocks(first.gradient_checkpointing)
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        rank = max(job.train.adapter.rank for job in jobs)
        sites = find_sites(base.denoiser, first.adapter.targets)
        if first.adapter.text_targets is not None:
            sites += find_text_sites(base.text_encoders, first.adapter.text_targets)
        self.bank = Bank(
            base.denoiser,
            sites=sites,
            text_encoders=base.text_encoders,
            token_sites=token_sites(base, first.adapter.identifier_tokens),
            rank=rank,
            num_slots=len(jobs),
            device=base.device,
            dtype=dtype,
        )
        self._optimizer = SlotAdamW(self.bank.flat_SP, self.bank.text_start)
        self._wording = Wording(base, self.bank, jobs)
        self._losses = RowLosses(base, self.bank, [job.train for job in jobs], self._wording)
        self._slots = {
            job.job_id: self._join(slot, job, (states or {}).get(job.job_id))
            for slot, job in enumerate(jobs, 1)
        }
        self.bank.flat_SP.requires_grad_(True)

    @property
    def active(self) -> tuple[str, ...]:
        """Job ids that still train, in slot order."""
        return tuple(s.job.job_id for s in self._slots.values() if s.status == "running")

    def status(self, job_id: str) -> Status:
        """Where the job stands."""
        return self._slots[job_id].status

    def slot(self, job_id: str) -> int:
        """The job's row of the bank."""
        return self._slots[job_id].slot

    def adapter(self, job_id: str) -> AdapterTensors:
        """The job's adapter as it is now, copied; its scale is `train.adapter.scale`."""
        with torch.no_grad():
            tensors = self.bank.read(self.slot(job_id))
            return {
                name: type(pair)(*(part.detach().clone() for part in pair))
                for name, pair in tensors.items()
            }

    def text_adapter(self, job_id: str) -> TextAdapter | None:
        """What the job's prompts mean as it is now, copied; None where the base's own text holds.

        Its LoRA has the adapter's scale folded in, as a published one has.
        """
        adapter = self._slots[job_id].job.train.adapter
        if not adapter.trains_text:
            return None
        tensors = {
            key: LoraPair(pair.down, pair.up * adapter.scale)
            for key, pair in self.adapter(job_id).items()
        }
        learned = self.learned(job_id)
        return TextAdapter(self._base, tensors, *([] if learned is None else [learned]))

    def learned(self, job_id: str) -> LearnedTokens | None:
        """The job's learned tokens as they are now, copied; None where it learns none."""
        entry = self._slots[job_id]
        vectors = self.bank.read_tokens(entry.slot)
        name = learned_identifier(entry.job.subject_id)
        return LearnedTokens(name, vectors) if vectors else None

    def state(self, job_id: str) -> SlotState:
        """All that the job's next train step depends on, copied to the CPU."""
        entry = self._slots[job_id]
        return SlotState(
            flat_N=snapshot(self.bank.flat_SP.detach()[entry.slot, entry.layout.index_N]),
            optimizer=self._optimizer.state(entry.slot),
            train_step=entry.train_step,
            opt_step=self._optimizer.opt_step(entry.slot),
            rank=entry.job.train.adapter.rank,
            layout=entry.layout.digest,
            loss_scale=entry.loss_scale,
            good_steps=entry.good_steps,
            curve_T3=torch.tensor(entry.curve, dtype=torch.float64).reshape(-1, 3),
        )

    def cancel(self, job_id: str, error: str | None = None) -> SlotReport:
        """Take a job out, as failed if there is an error; its neighbours go on."""
        entry = self._slots[job_id]
        self._leave(entry, "cancelled" if error is None else "failed", error)
        return entry.report((math.nan, math.nan, math.nan), math.nan, 0.0)

    def finish(self, job_id: str) -> Status:
        """End a running job here, as if this train step had been its last."""
        entry = self._slots[job_id]
        self._leave(entry, "finished")
        return entry.status

    def take_weights(self, job_id: str, flat_N: Tensor) -> None:
        """Replace the weights of a job that no longer trains."""
        entry = self._slots[job_id]
        assert entry.status != "running"
        with torch.no_grad():
            self.bank.flat_SP[entry.slot, entry.layout.index_N] = flat_N.to(self.bank.flat_SP)

    @torch.no_grad()
    def instance_loss(self, job_id: str, batches: Sequence[SlotBatch]) -> float:
        """Mean loss of instance rows in the job's slot as it is now; nothing changes."""
        slot = self.slot(job_id)
        parts = self._losses.parts([slot], [batches])
        return sum(float(part.instance_S[slot]) for part in parts)

    def close(self) -> None:
        """Take the bank off the denoiser."""
        self.bank.flat_SP.requires_grad_(False)
        self.bank.detach()
        self._checkpoint_blocks(False)

    def step(self) -> list[SlotReport]:
        """One train step of every active slot; a slot that is not finite fails alone."""
        entries = [entry for entry in self._slots.values() if entry.status == "running"]
        if not entries:
            return []
        slots = [entry.slot for entry in entries]
        scale_S = self.bank.flat_SP.new_ones(self.bank.flat_SP.shape[0])
        if self._precision == "fp16":
            scale_S[slots] = scale_S.new_tensor([entry.loss_scale for entry in entries])
        self.bank.flat_SP.grad = None
        parts = []
        for part in self._losses.parts(slots, [self._batches(entry) for entry in entries]):
            (part.total_S * scale_S).sum().backward()  # type: ignore[no-untyped-call]
            parts.append(torch.stack([figure.detach() for figure in part]))
        losses_3S = torch.stack(parts).sum(0)
        grad_SP = self.bank.flat_SP.grad
        assert grad_SP is not None
        norm_S = torch.linalg.vector_norm(grad_SP, dim=1)
        figures_4S = torch.stack([*losses_3S, norm_S]).double()
        for entry in entries:
            entry.ahead = self._draw(entry, entry.train_step + 1)  # while the device works
        figures_S4 = figures_4S.T.tolist()  # the step's one transfer
        return self._update(entries, grad_SP, [figures_S4[entry.slot] for entry in entries])

    def _checkpoint_blocks(self, enabled: bool) -> None:
        denoiser: Any = self._base.denoiser
        if enabled:
            denoiser.enable_gradient_checkpointing()
        else:
            denoiser.disable_gradient_checkpointing()

    def _update(
        self, entries: list[_Entry], grad_SP: Tensor, figures: list[list[float]]
    ) -> list[SlotReport]:
        updates: list[SlotUpdate] = []
        reports: list[SlotReport] = []
        for entry, (total, instance, prior, scaled_norm) in zip(entries, figures, strict=True):
            config = entry.job.train.optimizer
            rate = lr_at(
                config, self._optimizer.opt_step(entry.slot), entry.job.train.num_train_steps
            )
            norm = scaled_norm / entry.loss_scale
            entry.train_step += 1
            problem = None
            if math.isfinite(total) and math.isfinite(scaled_norm):
                coefficient = clip_coefficient(norm, config.max_grad_norm) / entry.loss_scale
                updates.append(SlotUpdate(entry.slot, rate, coefficient, self._text_rate(entry)))
                self._grow_loss_scale(entry)
            else:
                if not math.isfinite(total):
                    problem = f"the loss is {total} at train step {entry.train_step}"
                elif self._precision != "fp16" or entry.loss_scale <= 1.0:
                    problem = f"the gradient is {norm} at train step {entry.train_step}"
                else:
                    entry.loss_scale, entry.good_steps = entry.loss_scale / 2.0, 0
                    rate = 0.0
            entry.curve.append((total, instance, prior))
            if problem is not None:
                self._leave(entry, "failed", problem)
            elif entry.train_step >= entry.job.train.num_train_steps:
                self._leave(entry, "finished")
            reports.append(entry.report((total, instance, prior), norm, rate))
        if updates:
            self._optimizer.step(grad_SP, updates)
        return reports

    def _text_rate(self, entry: _Entry) -> float | None:
        peak, train = entry.job.train.adapter.text_learning_rate, entry.job.train
        step = self._optimizer.opt_step(entry.slot)
        return None if peak is None else lr_at(train.optimizer, step, train.num_train_steps, peak)

    def _grow_loss_scale(self, entry: _Entry) -> None:
        if self._precision != "fp16":
            return
        entry.good_steps += 1
        if entry.good_steps == GROWTH_STEPS:
            entry.loss_scale, entry.good_steps = entry.loss_scale * 2.0, 0

    def _leave(self, entry: _Entry, status: Status, error: str | None = None) -> None:
        entry.status, entry.error, entry.ahead = status, error, None

    def _batches(self, entry: _Entry) -> tuple[SlotBatch, ...]:
        batches, entry.ahead = entry.ahead, None
        return batches if batches is not None else self._draw(entry, entry.train_step)

    def _draw(self, entry: _Entry, train_step: int) -> tuple[SlotBatch, ...]:
        job = entry.job
        return make_slot_batches(
            job.tensors,
            job.train,
            job.subject_id,
            job.seed,
            train_step,
            num_train_timesteps=self._base.num_train_timesteps,
            scaling_factor=self._base.scaling_factor,
            latent_dtype=self.bank.flat_SP.dtype,
        )

    def _join(self, slot: int, job: SlotJob, state: SlotState | None) -> _Entry:
        adapter = job.train.adapter
        generator = stream(job.seed, job.subject_id, 0, "init")
        learned = None
        if adapter.identifier_tokens:
            words = adapter.identifier_init or job.class_noun
            noise = stream(job.seed, job.subject_id, 0, "init tokens")
            learned = init_tokens(self._base, words, adapter.identifier_tokens, noise)
        self.bank.init(slot, adapter.rank, adapter.scale, generator, learned)
        layout = SlotLayout.of(self.bank, adapter.rank)
        entry = _Entry(slot, job, layout, loss_scale=1.0)
        if self._precision == "fp16":
            entry.loss_scale = FIRST_LOSS_SCALE
        if state is None:
            self._optimizer.join(slot, job.train.optimizer, layout.index_N, layout.size)
            return entry
        if (state.layout, state.rank) != (layout.digest, adapter.rank):
            raise CheckpointError(
                f"the checkpoint of {job.job_id} has other sites or another rank",
                f"rank {state.rank}",
                "move the job's checkpoint folder away to start anew",
            )
        with torch.no_grad():
            self.bank.flat_SP[slot, layout.index_N] = state.flat_N.to(self.bank.flat_SP)
        self._optimizer.join(
            slot,
            job.train.optimizer,
            layout.index_N,
            layout.size,
            state.optimizer,
            state.opt_step,
        )
        entry.train_step = state.train_step
        entry.loss_scale, entry.good_steps = state.loss_scale, state.good_steps
        entry.curve = [(a, b, c) for a, b, c in state.curve_T3.tolist()]
        if entry.train_step >= job.train.num_train_steps:
            entry.status = "finished"
        return entry


@dataclass(slots=True)
class _Entry:
    """One slot of the pack as it stands."""

    slot: int
    job: SlotJob
    layout: SlotLayout
    loss_scale: float
    good_steps: int = 0
    train_step: int = 0
    status: Status = "running"
    error: str | None = None
    curve: list[tuple[float, float, float]] = field(default_factory=list)
    ahead: tuple[SlotBatch, ...] | None = None

    def report(
        self, losses: tuple[float, float, float], grad_norm: float, learning_rate: float
    ) -> SlotReport:
        return SlotReport(
            self.job.job_id,
            self.train_step,
            *losses,
            grad_norm,
            learning_rate,
            self.status,
            self.error,
        )


def _check(base: Base, jobs: Sequence[SlotJob]) -> None:
    if not jobs:
        raise ConfigError("a pack needs a job", "none", "give at least one")
    names = [job.job_id for job in jobs]
    if len(set(names)) != len(names):
        raise ConfigError("the job ids of a pack must differ", ", ".join(names), "name each once")
    shared: dict[str, set[Any]] = {
        "resolution": {job.train.resolution for job in jobs},
        "precision": {job.train.precision for job in jobs},
        "gradient_checkpointing": {job.train.gradient_checkpointing for job in jobs},
        "adapter.targets": {job.train.adapter.targets for job in jobs},
        "adapter.text_targets": {job.train.adapter.text_targets for job in jobs},
        "adapter.identifier_tokens": {job.train.adapter.identifier_tokens for job in jobs},
        "latents": {job.tensors.mean_NCHW.shape[1] for job in jobs},
    }
    for name, values in shared.items():
        if len(values) > 1:
            found = ", ".join(sorted(str(value) for value in values))
            raise ConfigError(f"the jobs of a pack must share {name}", found, "use two packs")
    if jobs[0].train.precision == "fp32" and base.dtype not in (torch.float32, torch.float64):
        raise ConfigError("precision fp32 needs a float32 base", str(base.dtype), "load it so")
