"""What a slot minimises: mse(instance) + lambda * mse(prior) (Ruiz et al. 2023, DreamBooth).

Shapes: B rows of a train step, S slots (0 is the null adapter), T timesteps, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raybooth.config.objective import VelocityWeight
from raybooth.errors import BaseModelError


class SlotLosses(NamedTuple):
    """total_S = instance_S + prior_weight_S * prior_S; slots without rows are zero."""

    total_S: Tensor
    instance_S: Tensor
    prior_S: Tensor


def alphas_cumprod(
    scheduler_config: Mapping[str, Any], *, zero_terminal_snr: bool = False
) -> Tensor:
    """alpha_bar_T of the base's noise schedule, float32, as diffusers' DDPMScheduler makes it.

    `zero_terminal_snr` shifts and scales sqrt(alpha_bar) so that the last is 0 and the first
    stays (Lin et al. 2023, "Common diffusion noise schedules ...", algorithm 1).
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    known = {key: value for key, value in scheduler_config.items() if key in _SCHEDULE_KEYS}
    if zero_terminal_snr:
        known["rescale_betas_zero_snr"] = True
    alpha_bar_T: Tensor = DDPMScheduler(**known).alphas_cumprod
    return alpha_bar_T.clone()


def snr(alpha_bar: Tensor) -> Tensor:
    """SNR = alpha_bar / (1 - alpha_bar), rounded as diffusers' compute_snr; may be 0 or inf."""
    return (alpha_bar.sqrt() / (1.0 - alpha_bar).sqrt()).square()


def snr_weights(
    alpha_bar: Tensor,
    gamma: float | None,
    prediction_type: str,
    velocity_weight: VelocityWeight = "over_snr_plus_one",
) -> Tensor:
    """Min-SNR weights (Hang et al. 2023): min(SNR, gamma) / SNR for epsilon.

    For velocity either min(SNR, gamma) / (SNR + 1), the paper's, or with `plus_one` that of
    diffusers' SDXL and advanced scripts, min(SNR, gamma) / SNR + 1. `alpha_bar` is that of each
    row's timestep (or of all T). At zero SNR min(SNR, gamma) / SNR is its limit, 1. Without gamma
    all weights are 1.
    """
    _check_prediction(prediction_type)
    if gamma is None:
        return torch.ones_like(alpha_bar)
    snr_ = snr(alpha_bar)
    over_snr = (torch.full_like(snr_, gamma) / snr_).clamp(max=1.0)
    if prediction_type == "epsilon":
        return over_snr
    if velocity_weight == "plus_one":
        return over_snr + 1.0
    return snr_.clamp(max=gamma) / (snr_ + 1.0)


def add_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, alpha_bar_B: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020)."""
    signal, sigma = _signal_and_sigma(alpha_bar_B)
    return signal * latents_BCHW + sigma * noise_BCHW


def velocity(latents_BCHW: Tensor, noise_BCHW: Tensor, alpha_bar_B: Tensor) -> Tensor:
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans and Ho 2022)."""
    signal, sigma = _signal_and_sigma(alpha_bar_B)
    return signal * noise_BCHW - sigma * latents_BCHW


def target(
    latents_BCHW: Tensor, noise_BCHW: Tensor, alpha_bar_B: Tensor, prediction_type: str
) -> Tensor:
    """What the denoiser must say: eps or v."""
    _check_prediction(prediction_type)
    if prediction_type == "epsilon":
        return noise_BCHW
    return velocity(latents_BCHW, noise_BCHW, alpha_bar_B)


def row_errors(
    prediction_BCHW: Tensor, target_BCHW: Tensor, weight_BHW: Tensor | None = None
) -> Tensor:
    """Mean squared error of each row, in the target's precision; pixels weighted where given."""
    square_BCHW = (prediction_BCHW.to(target_BCHW.dtype) - target_BCHW).square()
    if weight_BHW is not None:
        square_BCHW = square_BCHW * weight_BHW[:, None]
    return square_BCHW.flatten(1).mean(1)


def row_weights(
    weights_ST: Tensor, slot_B: Tensor, timesteps_B: Tensor, is_prior_B: Tensor
) -> Tensor:
    """Each instance row's weight at its own timestep in its own slot; prior rows always 1."""
    weight_B = weights_ST[slot_B, timesteps_B]
    return torch.where(is_prior_B, torch.ones_like(weight_B), weight_B)


def dreambooth_loss(
    error_B: Tensor,
    is_prior_B: Tensor,
    slot_B: Tensor,
    *,
    prior_weight_S: Tensor,
    num_slots: int,
    count_B: Tensor | None = None,
) -> SlotLosses:
    """L_s = mean(instance rows of s) + lambda_s * mean(prior rows of s), slot by slot.

    `num_slots` counts the null slot. Sum over slots before `backward`, never average: a slot's
    gradient must not depend on how many share the pack. A row that is not finite spoils its
    own slot only. When a train step's rows come in parts, `count_B` is the number of rows of each
    one's kind and slot in ALL parts; the parts' losses then sum to those of one call.
    """
    own_SB = slot_B[None, :] == torch.arange(num_slots, device=slot_B.device)[:, None]
    kinds = (own_SB & ~is_prior_B, own_SB & is_prior_B)
    if count_B is None:
        instance_S, prior_S = (_masked_mean(error_B, kind_SB) for kind_SB in kinds)
    else:
        instance_S, prior_S = (_masked_sum(error_B / count_B, kind_SB) for kind_SB in kinds)
    return SlotLosses(instance_S + prior_weight_S * prior_S, instance_S, prior_S)


_SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def _masked_sum(error_B: Tensor, mask_SB: Tensor) -> Tensor:
    return torch.where(mask_SB, error_B[None, :], torch.zeros_like(error_B)[None, :]).sum(1)


def _masked_mean(error_B: Tensor, mask_SB: Tensor) -> Tensor:
    return _masked_sum(error_B, mask_SB) / mask_SB.sum(1).clamp(min=1)


def _signal_and_sigma(alpha_bar_B: Tensor) -> tuple[Tensor, Tensor]:
    column = alpha_bar_B[:, None, None, None]
    return column.sqrt(), (1.0 - column).sqrt()


def _check_prediction(prediction_type: str) -> None:
    if prediction_type not in ("epsilon", "v_prediction"):
        raise BaseModelError(
            "the base predicts something that training does not know",
            prediction_type,
            "use a base that predicts epsilon or v_prediction",
        )
