"""The rows of a train step: one forward of the denoiser, and what every slot loses on its own rows.

Shapes: B rows of a train step (all active slots, grouped by slot), S slots (0 is the null adapter),
T timesteps, C H W latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from raybooth.config import TrainConfig
from raybooth.data.batch import SlotBatch
from raybooth.model.bank import Bank
from raybooth.model.base import Base, predict
from raybooth.training import objective


class RowLosses:
    """L_s of every slot, each with the objective and prior of its own train config."""

    def __init__(self, base: Base, bank: Bank, trains: Sequence[TrainConfig]) -> None:
        """`trains` of slots 1, 2, ..., in order; their precision is one."""
        self._base, self._bank = base, bank
        self._precision = trains[0].precision
        dtype = bank.flat_SP.dtype
        alpha_bar_T = objective.alphas_cumprod(base.scheduler_config)
        self._alpha_bar_T = alpha_bar_T.to(base.device, dtype)
        gammas = [None, *(train.objective.snr_gamma for train in trains)]
        table = [objective.snr_weights(alpha_bar_T, g, base.prediction_type) for g in gammas]
        self._weights_ST = torch.stack(table).to(self._alpha_bar_T)
        self._prior_weight_S = torch.tensor(
            [0.0, *(train.prior.loss_weight for train in trains)], dtype=dtype, device=base.device
        )
        self._rows: _Rows | None = None

    def __call__(self, slots: Sequence[int], batches: Sequence[SlotBatch]) -> objective.SlotLosses:
        """The losses of `batches`, one of each slot of `slots`; differentiable."""
        rows = self._rows
        if rows is None or rows.slots != tuple(slots):
            rows = self._rows = self._arrange(tuple(slots), batches)
        device, kind = self._base.device, self._base.prediction_type
        latents_BCHW = torch.cat([b.latents_BCHW for b in batches]).to(device, non_blocking=True)
        noise_BCHW = torch.cat([b.noise_BCHW for b in batches]).to(device, non_blocking=True)
        timesteps_B = torch.cat([b.timesteps_B for b in batches]).to(device, non_blocking=True)
        alpha_bar_B = self._alpha_bar_T[timesteps_B]
        noisy_BCHW = objective.add_noise(latents_BCHW, noise_BCHW, alpha_bar_B)
        self._bank.route(rows.route_B)
        with self._autocast():
            prediction_BCHW = predict(self._base, noisy_BCHW, timesteps_B, rows.conditioning)
        target_BCHW = objective.target(latents_BCHW, noise_BCHW, alpha_bar_B, kind)
        error_B = objective.row_errors(prediction_BCHW, target_BCHW)
        weight_B = objective.row_weights(
            self._weights_ST, rows.slot_B, timesteps_B, rows.is_prior_B
        )
        return objective.dreambooth_loss(
            error_B * weight_B,
            rows.is_prior_B,
            rows.slot_B,
            prior_weight_S=self._prior_weight_S,
            num_slots=self._prior_weight_S.shape[0],
        )

    def _arrange(self, slots: tuple[int, ...], batches: Sequence[SlotBatch]) -> _Rows:
        """What stays the same from train step to train step while nobody leaves."""
        device, base = self._base.device, self._base
        conditioning = {
            name: torch.cat([batch.conditioning[name] for batch in batches]).to(device, base.dtype)
            for name in batches[0].conditioning
        }
        pairs = zip(slots, batches, strict=True)
        route_B = torch.tensor([slot for slot, batch in pairs for _ in batch.is_prior_B])
        return _Rows(
            slots=slots,
            route_B=route_B,
            slot_B=route_B.to(device),
            is_prior_B=torch.cat([batch.is_prior_B for batch in batches]).to(device),
            conditioning=conditioning,
        )

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self._precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self._precision == "bf16" else torch.float16
        return torch.autocast(self._base.device.type, dtype=dtype)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the rows of the active slots are, on the device (`route_B` on the CPU)."""

    slots: tuple[int, ...]
    route_B: Tensor
    slot_B: Tensor
    is_prior_B: Tensor
    conditioning: dict[str, Tensor]
