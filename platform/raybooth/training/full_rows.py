"""The rows of a full run: each one's error and weight, and how workers share them.

Shapes: B rows of one latent size, C H W latents, N prompts, L tokens, T timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raybooth.data.batch import SlotBatch
from raybooth.errors import ConfigError
from raybooth.model.base import Base
from raybooth.training import objective
from raybooth.training.job import SlotJob

Predict = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
"""Noise or velocity of (latents_BCHW, timesteps_B, conditioning)."""


@dataclass(frozen=True, slots=True)
class Share:
    """Rows that one worker takes in one forward, each with its weight in the step's loss."""

    batch: SlotBatch
    weight_B: Tensor


class FullRows:
    """The objective of one full run, row by row, whoever predicts."""

    def __init__(self, base: Base, job: SlotJob) -> None:
        """Raises ConfigError when the objective does not suit the base, or text has no words."""
        config = job.train.objective
        config.check_base(base.scheduler_config)
        self._base = base
        self._alpha_bar_T = objective.alphas_cumprod(
            base.scheduler_config, zero_terminal_snr=config.zero_terminal_snr
        )
        self._weights_T = objective.snr_weights(
            self._alpha_bar_T, config.snr_gamma, base.prediction_type, config.velocity_weight
        )
        self._ids = _token_ids(base, job) if job.train.full.text_encoder else {}

    def errors(self, predict: Predict, batch: SlotBatch) -> Tensor:
        """Mean squared error of each row [B], pixels weighted; differentiable."""
        device = self._base.device
        latents_BCHW, noise_BCHW = batch.latents_BCHW.to(device), batch.noise_BCHW.to(device)
        alpha_bar_B = self._alpha_bar_T[batch.timesteps_B].to(device)
        noisy_BCHW = objective.add_noise(latents_BCHW, noise_BCHW, alpha_bar_B)
        conditioning = {name: rows.to(device) for name, rows in batch.conditioning.items()}
        prediction_BCHW = predict(noisy_BCHW, batch.timesteps_B.to(device), conditioning)
        target_BCHW = objective.target(
            latents_BCHW, noise_BCHW, alpha_bar_B, self._base.prediction_type
        )
        pixels_BHW = None if batch.weight_BHW is None else batch.weight_BHW.to(device)
        return objective.row_errors(prediction_BCHW, target_BCHW, pixels_BHW)

    def weights(self, batch: SlotBatch, num_instance: int, num_prior: int) -> Tensor:
        """Each row's weight in its own term's mean over the whole step; priors have no SNR."""
        instance_B = self._weights_T[batch.timesteps_B] / max(1, num_instance)
        return torch.where(batch.is_prior_B, 1.0 / max(1, num_prior), instance_B)

    def conditioning(self, batch: SlotBatch) -> dict[str, Tensor]:
        """The batch's own, and each row's token ids where text encoders are trained."""
        places = torch.tensor(batch.prompt_B)
        ids = {name: ids_NL[places] for name, ids_NL in self._ids.items()}
        return {**batch.conditioning, **ids}


def split(
    batch: SlotBatch,
    weight_B: Tensor,
    conditioning: Mapping[str, Tensor],
    place: int,
    shares: int,
) -> Share:
    """Rows place, place + shares, ... of the batch; where there is none, a row that weighs 0.

    ZeRO's workers exchange weights inside a forward, so each must make as many as the others.
    """
    rows = list(range(place, len(weight_B), shares))
    weights_B = weight_B[rows] if rows else torch.zeros(1)
    chosen = torch.tensor(rows or [0])
    return Share(
        SlotBatch(
            latents_BCHW=batch.latents_BCHW[chosen],
            noise_BCHW=batch.noise_BCHW[chosen],
            timesteps_B=batch.timesteps_B[chosen],
            conditioning={name: value[chosen] for name, value in conditioning.items()},
            is_prior_B=batch.is_prior_B[chosen],
            prompt_B=tuple(batch.prompt_B[row] for row in chosen.tolist()),
            weight_BHW=None if batch.weight_BHW is None else batch.weight_BHW[chosen],
        ),
        weights_B,
    )


def _token_ids(base: Base, job: SlotJob) -> dict[str, Tensor]:
    """Ids [N + 1, T] of the instance prompts, then of the class prompt (NO_PROMPT is the last)."""
    if not job.tensors.prompts:
        raise ConfigError(f"{job.job_id} trains text without words", "no prompts", "encode it anew")
    return base.family.tokenize(base.tokenizers, [*job.tensors.prompts, job.class_prompt])
