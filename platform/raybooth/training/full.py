"""A full fine-tune: every weight of the denoiser (and text encoders) under DeepSpeed ZeRO.

W workers split the rows of one train step, which is that of a pack: the same objective, noise
and timesteps (Ruiz et al. 2023). Rows are weighted by the whole step, so neither W nor the parts
of gradient accumulation change what is learned, only the order of sums.

Shapes: B rows of one latent size, C H W latents, N prompts, T timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raybooth.config import TrainConfig
from raybooth.data.batch import make_slot_batches
from raybooth.errors import ConfigError, TrainingError
from raybooth.model.base import Base
from raybooth.model.full_weights import trained_parts
from raybooth.training.full_engine import FullEngine
from raybooth.training.full_rows import FullRows, Share, split
from raybooth.training.job import SlotJob
from raybooth.training.optim import lr_at


class FullModel(nn.Module):
    """Text encoders (where they are trained) and denoiser as one module, as DeepSpeed needs."""

    def __init__(self, base: Base, train: TrainConfig) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(trained_parts(base, text_encoder=train.full.text_encoder))
        self._family = base.family
        self._texts = tuple(base.text_encoders) if train.full.text_encoder else ()
        self._autocast = (
            torch.autocast(base.device.type, dtype=torch.bfloat16)
            if train.precision == "bf16"
            else nullcontext()
        )
        self.requires_grad_(True)
        if train.gradient_checkpointing:
            for part in self.parts.values():
                _checkpoint_blocks(part)

    def forward(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: dict[str, Tensor]
    ) -> Tensor:
        """Noise or velocity; `conditioning` holds token ids where text encoders are trained."""
        with self._autocast:
            if self._texts:
                encoders = {name: self.parts[name] for name in self._texts}
                conditioning = {**conditioning, **self._family.condition(encoders, conditioning)}
            return self._family.predict(self.parts["unet"], latents_BCHW, timesteps_B, conditioning)


@dataclass(frozen=True, slots=True)
class FullState:
    """One worker's part of a run's state: weights lie with the first worker alone."""

    train_step: int
    weights: Mapping[str, Mapping[str, Tensor]]
    optimizer: Sequence[Mapping[str, Tensor]]
    """Moments of each flat piece that the worker updates, in the engine's order."""
    curve_T3: Tensor
    """loss, instance loss, prior loss of every train step, float64."""


@dataclass(frozen=True, slots=True)
class FullReport:
    """What one train step did; the same on every worker."""

    train_step: int
    """Train steps done."""
    loss: float
    instance_loss: float
    prior_loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    should_stop: bool
    """Any worker was asked to stop."""


class FullRun:
    """One subject trained by all workers of the default process group; all call every method."""

    def __init__(self, base: Base, job: SlotJob, *, state: FullState | None = None) -> None:
        """A fresh run, or one that goes on from `state`.

        Raises ConfigError when the base is not in float32 (masters are the weights themselves) or
        the objective does not suit it.
        """
        if base.dtype != torch.float32:
            raise ConfigError("method: full needs a float32 base", str(base.dtype), "load it so")
        self._base, self._job, self._train = base, job, job.train
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._rows = FullRows(base, job)
        if state is not None:
            _load_weights(base, state.weights)
        self.engine = FullEngine(FullModel(base, job.train), job.train, base.device)
        self.train_step = 0
        self.curve: list[tuple[float, float, float]] = []
        self._is_over = False
        if state is not None:
            self.engine.load_optimizer(state.optimizer)
            self.train_step = state.train_step
            self.curve = [(a, b, c) for a, b, c in state.curve_T3.tolist()]

    @property
    def is_finished(self) -> bool:
        """Whether every train step is done, or the run was ended."""
        return self._is_over or self.train_step >= self._train.num_train_steps

    def finish(self) -> None:
        """End here, as if this train step had been the last."""
        self._is_over = True

    def close(self) -> None:
        """Free the engine; the base's weights are no longer to be used."""
        self.engine.close()

    def step(self, *, should_stop: bool = False, trouble: Exception | None = None) -> FullReport:
        """One train step; `trouble` of this worker ends the run on every worker.

        Raises TrainingError when the loss or gradient is not finite, or another worker is in
        trouble, and `trouble` itself here.
        """
        rate = lr_at(self._train.optimizer, self.train_step, self._train.num_train_steps)
        shares = list(self._shares())
        figures_5 = torch.zeros(5, dtype=torch.float64)
        figures_5[3:] = torch.tensor([trouble is not None, should_stop], dtype=torch.float64)
        for place, share in enumerate(shares):
            last = place == len(shares) - 1
            self.engine.backward(self._loss(share, figures_5) * self._world, is_last=last)
        device_5 = figures_5.to(self._base.device, torch.float32)
        dist.all_reduce(device_5)
        instance, prior, _, troubles, stops = device_5.double().tolist()
        total = instance + self._train.prior.loss_weight * prior
        if troubles:
            self._end(trouble)
        self._refuse("loss", total)
        norm = self.engine.step(rate)
        self._refuse("gradient", norm)
        self.train_step += 1
        self.curve.append((total, instance, prior))
        return FullReport(self.train_step, total, instance, prior, norm, rate, stops > 0)

    def state(self) -> FullState:
        """This worker's part of all that the next train step depends on, on the CPU."""
        return FullState(
            train_step=self.train_step,
            weights=self.weights(),
            optimizer=self.engine.optimizer_state(),
            curve_T3=torch.tensor(self.curve, dtype=torch.float64).reshape(-1, 3),
        )

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Every trained weight by part, on the CPU; empty on all workers but the first."""
        parts = self.engine.module.parts
        gathered = {name: self.engine.gather(part) for name, part in parts.items()}
        return gathered if self._rank == 0 else {}

    def _loss(self, share: Share, figures_5: Tensor) -> Tensor:
        """Sum over the share's rows of weight x error; its parts are added to `figures_5`."""
        is_prior_B = share.batch.is_prior_B
        weighted_B = self._rows.errors(self.engine, share.batch) * share.weight_B.to(
            self._base.device
        )
        detached_B = weighted_B.detach().double().cpu()
        figures_5[0] += detached_B[~is_prior_B].sum()
        figures_5[1] += detached_B[is_prior_B].sum()
        factor_B = torch.where(is_prior_B, self._train.prior.loss_weight, 1.0)
        return (weighted_B * factor_B.to(weighted_B)).sum()

    def _shares(self) -> Iterator[Share]:
        """This worker's rows of the step, part by part; every worker gets as many parts."""
        batches = make_slot_batches(
            self._job.tensors,
            self._train,
            self._job.subject_id,
            self._job.seed,
            self.train_step,
            num_train_timesteps=self._base.num_train_timesteps,
            scaling_factor=self._base.scaling_factor,
        )
        is_prior = torch.cat([batch.is_prior_B for batch in batches])
        counts = int((~is_prior).sum()), int(is_prior.sum())
        parts = self._train.full.gradient_accumulation
        for batch in batches:
            weight_B = self._rows.weights(batch, *counts)
            with_ids = self._rows.conditioning(batch)
            for part in range(parts):
                place = self._rank * parts + part
                yield split(batch, weight_B, with_ids, place, self._world * parts)

    def _end(self, trouble: Exception | None) -> None:
        """Every worker ends with its own trouble, or that of another in its words."""
        said: list[Any] = [None] * self._world
        dist.all_gather_object(said, None if trouble is None else str(trouble))
        if trouble is not None:
            raise trouble
        raise TrainingError("another worker of this run failed", next(filter(None, said)))

    def _refuse(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} of {self._job.job_id} is not finite",
                f"{value} at train step {self.train_step + 1}",
                "lower optimizer.learning_rate, or check the photos",
            )


def _load_weights(base: Base, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    modules: Any = trained_parts(base, text_encoder=True)
    for part, state in weights.items():
        modules[part].load_state_dict(state, strict=True)


def _checkpoint_blocks(part: Any) -> None:
    """Blocks keep their inputs only; transformers' do so in training mode alone."""
    if hasattr(part, "enable_gradient_checkpointing"):
        part.enable_gradient_checkpointing()
    else:
        part.gradient_checkpointing_enable()
    part.train()
