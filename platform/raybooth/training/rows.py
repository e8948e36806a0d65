"""The rows of a train step: one forward of the denoiser a latent size, and what every slot loses.

Shapes: B rows of one latent size (all active slots, grouped by slot), S slots (0 is the null
adapter), T timesteps, C H W latents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from raybooth.config import TrainConfig
from raybooth.data.batch import SlotBatch
from raybooth.model.bank import Bank
from raybooth.model.base import Base, predict
from raybooth.training import objective
from raybooth.training.wording import Wording


class RowLosses:
    """L_s of every slot, each with the objective and prior of its own train config."""

    def __init__(
        self, base: Base, bank: Bank, trains: Sequence[TrainConfig], wording: Wording
    ) -> None:
        """`trains` of slots 1, 2, ..., in order; their precision is one.

        Raises ConfigError when an objective does not suit the base.
        """
        self._base, self._bank, self._wording = base, bank, wording
        self._precision = trains[0].precision
        dtype, kind = bank.flat_SP.dtype, base.prediction_type
        plain_T = objective.alphas_cumprod(base.scheduler_config)
        alpha_bars, weights = [plain_T], [torch.ones_like(plain_T)]
        for train in trains:
            config = train.objective
            config.check_base(base.scheduler_config)
            alpha_bar_T = objective.alphas_cumprod(
                base.scheduler_config, zero_terminal_snr=config.zero_terminal_snr
            )
            alpha_bars.append(alpha_bar_T)
            weights.append(
                objective.snr_weights(alpha_bar_T, config.snr_gamma, kind, config.velocity_weight)
            )
        self._alpha_bar_ST = torch.stack(alpha_bars).to(base.device, dtype)
        self._weights_ST = torch.stack(weights).to(base.device, dtype)
        self._prior_weight_S = torch.tensor(
            [0.0, *(train.prior.loss_weight for train in trains)], dtype=dtype, device=base.device
        )

    def parts(
        self, slots: Sequence[int], batches: Sequence[Sequence[SlotBatch]]
    ) -> Iterator[objective.SlotLosses]:
        """The losses of a train step in parts that sum to the whole, one a latent size.

        `batches[i]` are those of slot `slots[i]`. Take each part's `backward` before the next one:
        the bank's routes, and the activations, belong to one part.
        """
        by_size: dict[torch.Size, list[tuple[int, SlotBatch]]] = {}
        for slot, own in zip(slots, batches, strict=True):
            for batch in own:
                by_size.setdefault(batch.latents_BCHW.shape[1:], []).append((slot, batch))
        count: Counter[tuple[int, bool]] = Counter(
            (slot, is_prior)
            for slot, own in zip(slots, batches, strict=True)
            for batch in own
            for is_prior in batch.is_prior_B.tolist()
        )
        for pairs in by_size.values():
            of_part = [slot for slot, _ in pairs], [batch for _, batch in pairs]
            if len(by_size) == 1:
                yield self(*of_part)
                continue
            count_B = torch.tensor(
                [count[slot, is_prior] for slot, b in pairs for is_prior in b.is_prior_B.tolist()]
            )
            yield self(*of_part, count_B.to(self._base.device))

    def __call__(
        self, slots: Sequence[int], batches: Sequence[SlotBatch], count_B: Tensor | None = None
    ) -> objective.SlotLosses:
        """The losses of `batches`, all of one latent size, one of each of `slots`; differentiable.

        `count_B`: see `objective.dreambooth_loss`.
        """
        device = self._base.device
        pairs = zip(slots, batches, strict=True)
        route_B = torch.tensor([slot for slot, batch in pairs for _ in batch.is_prior_B])
        slot_B = route_B.to(device, non_blocking=True)
        is_prior_B = torch.cat([b.is_prior_B for b in batches]).to(device, non_blocking=True)
        latents_BCHW = torch.cat([b.latents_BCHW for b in batches]).to(device, non_blocking=True)
        noise_BCHW = torch.cat([b.noise_BCHW for b in batches]).to(device, non_blocking=True)
        timesteps_B = torch.cat([b.timesteps_B for b in batches]).to(device, non_blocking=True)
        conditioning = self._wording.cached(batches)
        alpha_bar_B = self._alpha_bar_ST[slot_B, timesteps_B]
        noisy_BCHW = objective.add_noise(latents_BCHW, noise_BCHW, alpha_bar_B)
        target_BCHW = objective.target(
            latents_BCHW, noise_BCHW, alpha_bar_B, self._base.prediction_type
        )
        from_base_B = torch.cat([b.is_prior_B & b.from_base for b in batches])
        if from_base_B.any():
            rows = from_base_B.nonzero()[:, 0].to(device)
            cond = {name: tensor[rows] for name, tensor in conditioning.items()}
            asked_BCHW = self._ask_base(noisy_BCHW[rows], timesteps_B[rows], cond)
            target_BCHW = target_BCHW.index_copy(0, rows, asked_BCHW.to(target_BCHW.dtype))
        self._bank.route(route_B)
        with self._autocast():
            meant = {**conditioning, **self._wording.trained(slots, batches)}
            prediction_BCHW = predict(self._base, noisy_BCHW, timesteps_B, meant)
        error_B = objective.row_errors(
            prediction_BCHW, target_BCHW, _pixel_weights(batches, device)
        )
        weight_B = objective.row_weights(self._weights_ST, slot_B, timesteps_B, is_prior_B)
        return objective.dreambooth_loss(
            error_B * weight_B,
            is_prior_B,
            slot_B,
            prior_weight_S=self._prior_weight_S,
            num_slots=self._prior_weight_S.shape[0],
            count_B=count_B,
        )

    @torch.no_grad()
    def _ask_base(self, noisy_BCHW: Tensor, timesteps_B: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """What the null adapter, slot 0, predicts."""
        self._bank.route(torch.zeros(len(noisy_BCHW), dtype=torch.long))
        with self._autocast():
            return predict(self._base, noisy_BCHW, timesteps_B, cond)

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self._precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self._precision == "bf16" else torch.float16
        return torch.autocast(self._base.device.type, dtype=dtype)


def _pixel_weights(batches: Sequence[SlotBatch], device: torch.device) -> Tensor | None:
    """1 in the rows of slots without masks; none where no slot has one."""
    if all(batch.weight_BHW is None for batch in batches):
        return None
    weights = [
        torch.ones_like(batch.latents_BCHW[:, 0]) if batch.weight_BHW is None else batch.weight_BHW
        for batch in batches
    ]
    return torch.cat(weights).to(device, non_blocking=True)
