"""The DreamBooth loss and the SNR tables against diffusers' schedule and printed values."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from raybooth.errors import BaseModelError
from raybooth.training import objective

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
TIMESTEPS = [0, 10, 100, 250, 500, 750, 999]


def digits(value: float, number: int = 6) -> str:
    return f"{value:.{number}g}"


def at(table_T: torch.Tensor) -> list[str]:
    return [digits(table_T[t].item()) for t in TIMESTEPS]


def test_alpha_bar_of_stable_diffusion() -> None:
    alpha_bar_T = objective.alphas_cumprod(STABLE_DIFFUSION)
    found = [alpha_bar_T[t].item() for t in (0, 100, 250, 500, 750, 999)]
    expected = [0.99914998, 0.89422315, 0.67379230, 0.27633247, 0.05616980, 0.00466010]
    assert found == pytest.approx(expected, abs=5e-9, rel=1e-6)


def test_snr_to_six_digits() -> None:
    snr_T = objective.snr(objective.alphas_cumprod(STABLE_DIFFUSION))
    assert at(snr_T) == [
        *("1175.44", "103.507", "8.45387", "2.06553", "0.38185", "0.0595126", "0.00468191"),
    ]


def test_min_snr_weights_to_six_digits() -> None:
    alpha_bar_T = objective.alphas_cumprod(STABLE_DIFFUSION)
    epsilon_T = objective.snr_weights(alpha_bar_T, 5.0, "epsilon")
    velocity_T = objective.snr_weights(alpha_bar_T, 5.0, "v_prediction")
    assert at(epsilon_T) == ["0.00425372", "0.0483057", "0.591445", "1", "1", "1", "1"]
    assert at(velocity_T) == [
        *("0.00425011", "0.0478435", "0.528884", "0.673792", "0.276332", "0.0561698"),
        "0.00466009",
    ]
    assert epsilon_T.mean().item() == pytest.approx(0.916571, abs=5e-7)
    assert velocity_T.mean().item() == pytest.approx(0.294331, abs=5e-7)
    plus_one_T = objective.snr_weights(alpha_bar_T, 5.0, "v_prediction", "plus_one")
    assert at(plus_one_T) == ["1.00425", "1.04831", "1.59145", "2", "2", "2", "2"]
    assert plus_one_T.mean().item() == pytest.approx(1.916571, abs=5e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_weights_are_finite_at_zero_snr(prediction_type: str) -> None:
    alpha_bar_T = objective.alphas_cumprod({**STABLE_DIFFUSION, "rescale_betas_zero_snr": True})
    assert alpha_bar_T[-1] < 1e-7
    alpha_bar_T[-1] = 0.0
    weights_T = objective.snr_weights(alpha_bar_T, 5.0, prediction_type)
    assert torch.isfinite(weights_T).all()
    assert weights_T[-1] == (1.0 if prediction_type == "epsilon" else 0.0)


def test_zero_terminal_snr_is_diffusers_rescaling() -> None:
    plain_T = objective.alphas_cumprod(STABLE_DIFFUSION)
    found_T = objective.alphas_cumprod(STABLE_DIFFUSION, zero_terminal_snr=True)
    expected_T = DDPMScheduler.from_config(
        {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True}
    ).alphas_cumprod
    assert torch.equal(found_T, expected_T)
    assert found_T[-1] < 1e-7
    assert found_T[0].item() == pytest.approx(plain_T[0].item(), rel=1e-6)


def test_without_gamma_weights_are_one() -> None:
    alpha_bar_T = objective.alphas_cumprod(STABLE_DIFFUSION)
    for prediction_type in ("epsilon", "v_prediction"):
        assert (objective.snr_weights(alpha_bar_T, None, prediction_type) == 1).all()


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(BaseModelError, match="sample"):
        objective.snr_weights(torch.ones(1), 5.0, "sample")


def test_noise_and_velocity_are_diffusers() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 100, 500, 999])
    scheduler = DDPMScheduler.from_config(STABLE_DIFFUSION)
    alpha_bar_B = objective.alphas_cumprod(STABLE_DIFFUSION)[timesteps]
    noisy = objective.add_noise(latents, noise, alpha_bar_B)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timesteps))
    velocity = objective.target(latents, noise, alpha_bar_B, "v_prediction")
    torch.testing.assert_close(velocity, scheduler.get_velocity(latents, noise, timesteps))
    assert objective.target(latents, noise, alpha_bar_B, "epsilon") is noise


def rows(*layout: tuple[int, bool]) -> tuple[torch.Tensor, torch.Tensor]:
    slot_B, is_prior_B = zip(*layout, strict=True)
    return torch.tensor(slot_B), torch.tensor(is_prior_B)


def test_each_term_is_meaned_over_its_own_rows_and_slots_are_not_averaged() -> None:
    slot_B, is_prior_B = rows((1, False), (1, False), (1, True), (1, True), (2, False), (3, True))
    error_B = torch.tensor([1.0, 3.0, 10.0, 30.0, 7.0, 5.0], requires_grad=True)
    losses = objective.dreambooth_loss(
        error_B,
        is_prior_B,
        slot_B,
        prior_weight_S=torch.tensor([0.0, 0.5, 1.0, 2.0]),
        num_slots=4,
    )
    assert losses.total_S.tolist() == [0.0, 2.0 + 0.5 * 20.0, 7.0, 10.0]
    assert losses.instance_S.tolist() == [0.0, 2.0, 7.0, 0.0]
    assert losses.prior_S.tolist() == [0.0, 20.0, 0.0, 5.0]
    losses.total_S.sum().backward()  # type: ignore[no-untyped-call]
    assert error_B.grad is not None
    assert error_B.grad.tolist() == [0.5, 0.5, 0.25, 0.25, 1.0, 2.0]


def test_rows_may_stand_in_any_order() -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    slot_B, is_prior_B = rows((1, False), (1, True), (2, False), (2, False), (2, True), (2, True))
    error_B = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    weights_S = torch.tensor([0.0, 1.0, 0.25])

    def loss(order: torch.Tensor) -> list[float]:
        return objective.dreambooth_loss(
            error_B[order],
            is_prior_B[order],
            slot_B[order],
            prior_weight_S=weights_S,
            num_slots=3,
        ).total_S.tolist()

    assert loss(order) == loss(torch.arange(6)) == [0.0, 3.0, 6.0 + 0.25 * 24.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_spoils_its_own_slot_only(bad: float) -> None:
    slot_B, is_prior_B = rows((1, False), (1, True), (2, False), (2, True))
    error_B = torch.tensor([1.0, 2.0, bad, 3.0], requires_grad=True)
    losses = objective.dreambooth_loss(
        error_B, is_prior_B, slot_B, prior_weight_S=torch.tensor([0.0, 1.0, 1.0]), num_slots=3
    )
    assert losses.total_S[:2].tolist() == [0.0, 3.0]
    assert not torch.isfinite(losses.total_S[2])
    losses.total_S.sum().backward()  # type: ignore[no-untyped-call]
    assert error_B.grad is not None
    assert error_B.grad[:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_min_snr_weights_instance_rows_with_their_own_timesteps(batch_size: int) -> None:
    """Not, as in diffusers' scripts, with the mean of instance and prior timesteps' weights."""
    alpha_bar_T = objective.alphas_cumprod(STABLE_DIFFUSION)
    weights_ST = torch.stack([objective.snr_weights(alpha_bar_T, 5.0, "epsilon")] * 2)
    timesteps_B = torch.tensor([10] * batch_size + [750] * batch_size)
    slot_B = torch.ones(2 * batch_size, dtype=torch.long)
    is_prior_B = torch.tensor([False] * batch_size + [True] * batch_size)
    weight_B = objective.row_weights(weights_ST, slot_B, timesteps_B, is_prior_B)
    losses = objective.dreambooth_loss(
        weight_B, is_prior_B, slot_B, prior_weight_S=torch.tensor([0.0, 1.0]), num_slots=2
    )
    assert digits(losses.instance_S[1].item()) == "0.0483057"
    assert losses.prior_S[1].item() == 1.0


def test_prior_rows_are_never_weighted_even_where_instance_rows_would_be() -> None:
    weights_ST = torch.full((3, 1000), 0.1)
    weights_ST[2] = 0.7
    slot_B, is_prior_B = rows((1, False), (1, True), (2, False), (2, True))
    timesteps_B = torch.tensor([5, 5, 5, 5])
    weight_B = objective.row_weights(weights_ST, slot_B, timesteps_B, is_prior_B)
    assert weight_B.tolist() == pytest.approx([0.1, 1.0, 0.7, 1.0])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_min_snr_weighs_instance_rows_by_their_own_timesteps(batch_size: int) -> None:
    """Bug 1 of the peers: weights of all 2B timesteps; B = 1 took the mean of both, 10.9x off."""
    alpha_bar_T = objective.alphas_cumprod(STABLE_DIFFUSION)
    weights_ST = torch.stack([torch.ones(1000), objective.snr_weights(alpha_bar_T, 5.0, "epsilon")])
    layout = [(1, False)] * batch_size + [(1, True)] * batch_size
    slot_B, is_prior_B = rows(*layout)
    timesteps_B = torch.tensor([10] * batch_size + [750] * batch_size)
    weight_B = objective.row_weights(weights_ST, slot_B, timesteps_B, is_prior_B)
    losses = objective.dreambooth_loss(
        weight_B, is_prior_B, slot_B, prior_weight_S=torch.ones(2), num_slots=2
    )
    assert digits(losses.instance_S[1].item()) == "0.0483057"
    assert losses.prior_S[1] == 1.0
