"""One row update gives diffusers' own three schedulers."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from raybooth.errors import RequestError
from raybooth.model.solver import COEFFICIENTS, SOLVERS, RowPlan, plan_rows

SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp2m": DPMSolverMultistepScheduler,
}


def _config(prediction: str, zero_snr: bool, spacing: str) -> dict[str, Any]:
    return {
        **SD,
        "prediction_type": prediction,
        "rescale_betas_zero_snr": zero_snr,
        "timestep_spacing": spacing,
    }


def _model(x: Tensor, t: float) -> Tensor:
    """A denoiser that is not linear in x and knows the time."""
    return torch.tanh(x * 0.7 + t / 500) - 0.3 * torch.roll(x, 1, -1)


def _ours(plan: RowPlan, noise: Tensor) -> Tensor:
    x, x0_prev = noise * plan.init_scale, torch.zeros_like(noise)
    for index in range(plan.num_steps):
        scale, a, b, c, d, cx, c0, ce, ch = plan.coefficients(index)
        m = _model(x * scale, float(plan.timesteps[index]))
        x0 = a * x + b * m
        e = c * x + d * m
        x, x0_prev = cx * x + c0 * x0 + ce * e + ch * x0_prev, x0
    return x


def _theirs(solver: str, config: dict[str, Any], num_steps: int, noise: Tensor) -> Tensor:
    scheduler = SCHEDULERS[solver].from_config(config)
    scheduler.set_timesteps(num_steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        m = _model(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(m, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("prediction", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True)],
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_row_update_is_diffusers_scheduler(
    solver: str, prediction: str, zero_snr: bool, spacing: str
) -> None:
    config = _config(prediction, zero_snr, spacing)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for num_steps in (1, 2, 3, 14, 15, 25, 50):
        ours = _ours(plan_rows(config, solver, num_steps), noise)
        theirs = _theirs(solver, config, num_steps, noise)
        # zero-SNR Euler starts at sigma 4096: in fp32 diffusers itself is this far from fp64
        bound = 1e-3 if solver == "euler" and zero_snr else 1e-5
        assert _apart(ours, theirs) < bound, num_steps


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_step_count_has_a_plan(solver: str) -> None:
    for spacing in ("leading", "trailing", "linspace"):
        config = _config("epsilon", False, spacing)
        for num_steps in (*range(1, 500, 9), 61, 103, 998):
            plan = plan_rows(config, solver, num_steps)
            assert len(plan.timesteps) == num_steps
            assert plan.a.dtype == np.float64


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_step_lands_on_the_clean_latent(solver: str) -> None:
    plan = plan_rows({**_config("epsilon", False, "trailing"), "set_alpha_to_one": True}, solver, 9)
    last = dict(zip(COEFFICIENTS, plan.coefficients(8), strict=True))
    a, b = last["a"], last["b"]
    c, d = last["c"], last["d"]
    x, m = 0.3, -0.7
    end = last["cx"] * x + last["c0"] * (a * x + b * m) + last["ce"] * (c * x + d * m)
    assert end == pytest.approx(a * x + b * m)
    assert last["ch"] == 0


@pytest.mark.parametrize(
    ("solver", "num_steps", "message"),
    [
        ("unipc", 10, "solver is not known"),
        ("ddim", 0, "out of range"),
        ("ddim", 1001, "out of range"),
    ],
)
def test_what_cannot_be_planned_is_refused(solver: str, num_steps: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan_rows(_config("epsilon", False, "leading"), solver, num_steps)


def test_noise_prediction_at_zero_snr_is_refused_by_ddim() -> None:
    """x0 = (x - sigma e) / 0 has no value at the first timestep."""
    with pytest.raises(RequestError, match="cannot be sampled this way"):
        plan_rows(_config("epsilon", True, "trailing"), "ddim", 10)


def _apart(ours: Tensor, reference: Tensor) -> float:
    """max|d| / max|ref|."""
    return float((ours - reference).abs().max() / reference.abs().max())
