"""x0 = a x + b m; e = c x + d m; x' = cx x + c0 x0 + ce e + ch x0_prev: one update for all solvers.

x is the latent, m the denoiser's guided output, x0 the clean latent that it implies, e the noise
(DDIM: Song et al. 2021; Euler: Karras et al. 2022; DPM-Solver++ 2M: Lu et al. 2022). A plan holds
the eight coefficients of each denoise step in float64, made once from diffusers' own schedulers, so
rows with different solvers and step counts share a batch.

The same image in diffusers, `config` being `pipe.scheduler.config` of the loaded pipeline:

    ddim     DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
    euler    EulerDiscreteScheduler.from_config(config, final_sigmas_type="zero",
                 timestep_type="discrete")
    dpmpp2m  DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++",
                 solver_order=2, solver_type="midpoint", lower_order_final=True,
                 euler_at_final=False, final_sigmas_type="zero", thresholding=False)

then `pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), ...)`. Timestep spacing,
steps offset and zero-terminal-SNR rescaling are the base's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raybooth.errors import RequestError

Floats = npt.NDArray[np.float64]

SOLVERS = ("ddim", "euler", "dpmpp2m")

COEFFICIENTS = ("input_scale", "a", "b", "c", "d", "cx", "c0", "ce", "ch")

_DPM = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "thresholding": False,
    "use_flow_sigmas": False,
}
_EULER = {
    "final_sigmas_type": "zero",
    "timestep_type": "discrete",
    "interpolation_type": "linear",
}
_DDIM = {"clip_sample": False, "thresholding": False}


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Everything about one image's denoising but its latents; arrays are [num_steps]."""

    solver: str
    num_steps: int
    timesteps: Floats
    init_scale: float
    """Standard deviation of the first latent."""

    input_scale: Floats
    """What the latent is multiplied by before the denoiser sees it."""

    a: Floats
    b: Floats
    c: Floats
    d: Floats
    cx: Floats
    c0: Floats
    ce: Floats
    ch: Floats

    def coefficients(self, index: int) -> tuple[float, ...]:
        """The values of COEFFICIENTS at denoise step `index`."""
        return tuple(float(getattr(self, name)[index]) for name in COEFFICIENTS)


def plan_rows(scheduler_config: Mapping[str, Any], solver: str, num_steps: int) -> RowPlan:
    """The plan of `solver` in `num_steps` on a base's schedule.

    Raises RequestError when the solver is not known or the schedule has no such step count.
    """
    if solver not in SOLVERS:
        raise RequestError("the solver is not known", repr(solver), f"use {', '.join(SOLVERS)}")
    most = int(scheduler_config.get("num_train_timesteps", 1000))
    if not 1 <= num_steps <= most:
        found = f"{num_steps} denoise steps"
        raise RequestError("the number of denoise steps is out of range", found, f"use 1 to {most}")
    make = {"ddim": _plan_ddim, "euler": _plan_euler, "dpmpp2m": _plan_dpmpp2m}[solver]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        plan = make(dict(scheduler_config), num_steps)
    whole = all(np.isfinite(getattr(plan, name)).all() for name in COEFFICIENTS)
    t = plan.timesteps
    if not whole or len(t) != num_steps or t[-1] < 0 or (np.diff(t) >= 0).any():
        found = f"{solver} with {num_steps} denoise steps"
        do = "use another solver or number of denoise steps"
        raise RequestError("the base's noise schedule cannot be sampled this way", found, do)
    return plan


def _plan_ddim(config: dict[str, Any], num_steps: int) -> RowPlan:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(config, **_DDIM)
    scheduler.set_timesteps(num_steps)
    t = scheduler.timesteps.numpy()[:num_steps]
    before = t - scheduler.config.num_train_timesteps // num_steps
    alpha_bars = scheduler.alphas_cumprod.double().numpy()
    alpha_bar = alpha_bars[t]
    last = float(scheduler.final_alpha_cumprod)
    alpha_bar_next = np.where(before >= 0, alpha_bars[np.maximum(before, 0)], last)
    a, b, c, d = _x0_and_noise(config, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    zero, one = np.zeros(len(t)), np.ones(len(t))
    c0, ce = np.sqrt(alpha_bar_next), np.sqrt(1 - alpha_bar_next)
    return RowPlan("ddim", num_steps, t.astype(float), 1.0, one, a, b, c, d, zero, c0, ce, zero)


def _plan_euler(config: dict[str, Any], num_steps: int) -> RowPlan:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler.from_config(config, **_EULER)
    scheduler.set_timesteps(num_steps)
    sigmas = _sigmas(scheduler, num_steps)
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    t = scheduler.timesteps.double().numpy()[:num_steps]
    zero, one = np.zeros(len(t)), np.ones(len(t))
    if _predicts_velocity(config):
        a, b = 1 / (sigma**2 + 1), -sigma / np.sqrt(sigma**2 + 1)
        c, d = sigma / (sigma**2 + 1), 1 / np.sqrt(sigma**2 + 1)
    else:
        a, b, c, d = one, -sigma, zero, one
    input_scale = 1 / np.sqrt(sigma**2 + 1)
    init_scale = float(scheduler.init_noise_sigma)
    # x' = x + (sigma_next - sigma) e, without the cancellation: x = x0 + sigma e
    return RowPlan(
        "euler", num_steps, t, init_scale, input_scale, a, b, c, d, zero, one, sigma_next, zero
    )


def _plan_dpmpp2m(config: dict[str, Any], num_steps: int) -> RowPlan:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler.from_config(config, **_DPM)
    scheduler.set_timesteps(num_steps)
    sigmas = _sigmas(scheduler, num_steps)
    t = scheduler.timesteps.double().numpy()[:num_steps]
    alphas = 1 / np.sqrt(sigmas**2 + 1)
    noises = sigmas * alphas
    a, b, c, d = _x0_and_noise(config, alphas[:-1], noises[:-1])
    h = np.log(sigmas[:-1]) - np.log(sigmas[1:])  # of lambda = log(alpha / sigma); last infinite
    weight = alphas[1:] * -np.expm1(-h)
    # D1 = (x0 - x0_prev) h / h_before, half of it added; first and last step are of first order
    second = np.zeros(len(t))
    second[1:-1] = 0.5 * h[1:-1] / h[:-2]
    zero, one = np.zeros(len(t)), np.ones(len(t))
    cx, c0, ch = noises[1:] / noises[:-1], weight * (1 + second), -weight * second
    return RowPlan("dpmpp2m", num_steps, t, 1.0, one, a, b, c, d, cx, c0, zero, ch)


def _sigmas(scheduler: Any, num_steps: int) -> Floats:
    """[num_steps + 1], the last 0.

    Under trailing spacing diffusers makes one step too many, at timestep -1, for 62 of the step
    counts up to 1000 (61, 103, 121, ...): rounding in its `arange`. That step is left out.
    """
    sigmas: Floats = scheduler.sigmas.double().numpy()[: num_steps + 1].copy()
    sigmas[num_steps] = 0.0
    return sigmas


def _x0_and_noise(
    config: dict[str, Any], alpha: Floats, sigma: Floats
) -> tuple[Floats, Floats, Floats, Floats]:
    """a, b, c, d of a variance-preserving x = alpha x0 + sigma e."""
    if _predicts_velocity(config):
        return alpha, -sigma, sigma, alpha
    return 1 / alpha, -sigma / alpha, np.zeros(len(alpha)), np.ones(len(alpha))


def _predicts_velocity(config: dict[str, Any]) -> bool:
    return bool(config.get("prediction_type") == "v_prediction")
