"""The rows of a train step depend on (seed, subject, train step) alone, and conditioning fits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from raybooth.config import TrainConfig
from raybooth.data.batch import (
    SlotBatch,
    make_slot_batch,
    make_slot_batches,
    plan_batch,
    stream,
)
from raybooth.data.encode import SubjectTensors
from raybooth.data.prior import PriorTensors
from raybooth.errors import PriorError

INSTANCE, PRIOR = 1.0, -1.0


def train(batch_size: int = 1, *, num_prior: int = 5) -> TrainConfig:
    prior = {"num_images": num_prior, "loss_weight": float(num_prior > 0)}
    return TrainConfig.model_validate({"batch_size": batch_size, "prior": prior})


def tensors(num_instance: int = 3, num_prior: int = 5, std: float = 0.0) -> SubjectTensors:
    """Image i of the instance has latents i+1, of the prior -(i+1); prompts are +1 and -1."""

    def posterior(sign: float, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = sign * torch.arange(1, num + 1, dtype=torch.float32)
        mean_NCHW = values[:, None, None, None].expand(num, 4, 2, 2).contiguous()
        return mean_NCHW, torch.full_like(mean_NCHW, std)

    def prompt(sign: float) -> dict[str, torch.Tensor]:
        return {"encoder_hidden_states": torch.full((1, 3, 2), sign)}

    mean_NCHW, std_NCHW = posterior(INSTANCE, num_instance)
    prior_mean_NCHW, prior_std_NCHW = posterior(PRIOR, num_prior)
    digests = tuple(str(i) for i in range(num_prior))
    prior = PriorTensors(prior_mean_NCHW, prior_std_NCHW, prompt(PRIOR), digests)
    photos = tuple(str(i) for i in range(num_instance))
    return SubjectTensors(
        mean_NCHW, std_NCHW, prompt(INSTANCE), prior if num_prior else None, photos
    )


def batch(
    of: SubjectTensors, config: TrainConfig, train_step: int = 0, seed: int = 7, **others: object
) -> SlotBatch:
    options: dict[str, object] = {"num_train_timesteps": 1000, "scaling_factor": 0.5, **others}
    return make_slot_batch(of, config, "rex", seed, train_step, **options)  # type: ignore[arg-type]


def test_streams_differ_by_each_of_the_four_values() -> None:
    base = (0, "rex", 0, "noise")
    others = [(1, "rex", 0, "noise"), (0, "tom", 0, "noise"), (0, "rex", 1, "noise")]
    others += [(0, "rex", 0, "vae"), (0, "rex1", 0, "noise"), (10, "rex", 0, "noise")]
    draws = [torch.randn(8, generator=stream(*values)) for values in (base, base, *others)]
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(draw.tolist()) for draw in draws}) == len(others) + 1


def test_streams_leave_torchs_own_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    batch(tensors(std=0.1), train(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
def test_each_image_once_an_epoch_whatever_the_batch_size(batch_size: int) -> None:
    instance: list[int] = []
    prior: list[int] = []
    for train_step in range(70):
        plan = plan_batch(0, "rex", train_step, batch_size, 5, 7)
        instance += plan.instance_indices
        prior += plan.prior_indices
    for order, num in ((instance, 5), (prior, 7)):
        epochs = [order[start : start + num] for start in range(0, 70, num)]
        assert all(sorted(epoch) == list(range(num)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 3
    assert len(instance) == 70 * batch_size


def test_the_order_of_images_does_not_depend_on_the_batch_size() -> None:
    orders = []
    for batch_size in (1, 2, 4):
        steps = range(16 // batch_size)
        plans = [plan_batch(3, "rex", step, batch_size, 3, 5) for step in steps]
        orders.append(
            (
                [index for plan in plans for index in plan.instance_indices],
                [index for plan in plans for index in plan.prior_indices],
            )
        )
    assert orders[0] == orders[1] == orders[2]


def test_subjects_and_seeds_have_orders_of_their_own() -> None:
    orders = Counter(
        tuple(plan_batch(seed, name, 0, 8, 8, 0).instance_indices)
        for seed in range(4)
        for name in ("rex", "tom")
    )
    assert len(orders) == 8
    plans = [plan_batch(seed, "rex", 0, 8, 8, 8) for seed in range(4)]
    assert any(plan.instance_indices != plan.prior_indices for plan in plans)


def test_any_step_alone_equals_the_step_of_a_run() -> None:
    """A resumed run reads what the uninterrupted run read (bug 7 of the peers)."""
    run = [batch(tensors(std=0.3), train(2), step) for step in range(12)]
    for step in (11, 4, 0, 7):
        alone = batch(tensors(std=0.3), train(2), step)
        for name in ("latents_BCHW", "noise_BCHW", "timesteps_B", "is_prior_B"):
            assert torch.equal(getattr(alone, name), getattr(run[step], name))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_class_conditioning_meets_class_latents(batch_size: int) -> None:
    """Bug 2 of the peers: `[i, c].repeat(B)` met images `[i, i, c, c]`."""
    for train_step in range(6):
        rows = batch(tensors(), train(batch_size), train_step)
        assert rows.is_prior_B.tolist() == [False] * batch_size + [True] * batch_size
        sign_of_latents_B = rows.latents_BCHW.flatten(1).mean(1).sign()
        sign_of_prompt_B = rows.conditioning["encoder_hidden_states"].flatten(1).mean(1)
        assert torch.equal(sign_of_latents_B, sign_of_prompt_B)
        assert torch.equal(sign_of_prompt_B < 0, rows.is_prior_B)
        assert rows.conditioning["encoder_hidden_states"].shape == (2 * batch_size, 3, 2)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_latents_are_those_of_the_planned_images(batch_size: int) -> None:
    """Bug 4 of the peers: latents cached by step met a reshuffled loader."""
    for train_step in range(9):
        plan = plan_batch(7, "rex", train_step, batch_size, 3, 5)
        rows = batch(tensors(), train(batch_size), train_step, scaling_factor=1.0)
        values = rows.latents_BCHW[:, 0, 0, 0].tolist()
        assert values == [i + 1.0 for i in plan.instance_indices] + [
            -(i + 1.0) for i in plan.prior_indices
        ]


def test_embeddings_do_not_grow_from_step_to_step() -> None:
    """Bug 5 of the peers: prompts repeated in place."""
    of = tensors()
    for train_step in range(3):
        assert len(batch(of, train(2), train_step).conditioning["encoder_hidden_states"]) == 4
    assert of.instance_conditioning["encoder_hidden_states"].shape == (1, 3, 2)


def test_latents_are_the_sampled_posterior_times_the_scaling_factor() -> None:
    of = tensors(std=0.25)
    rows = batch(of, train(2), 5, scaling_factor=0.18215)
    plan = plan_batch(7, "rex", 5, 2, 3, 5)
    noise_BCHW = torch.randn((4, 4, 2, 2), generator=stream(7, "rex", 5, "vae"))
    assert of.prior is not None
    mean_BCHW = torch.cat(
        [of.mean_NCHW[list(plan.instance_indices)], of.prior.mean_NCHW[list(plan.prior_indices)]]
    )
    assert torch.equal(rows.latents_BCHW, (mean_BCHW + 0.25 * noise_BCHW) * 0.18215)
    again = batch(of, train(2), 6, scaling_factor=0.18215)
    assert not torch.equal(rows.latents_BCHW, again.latents_BCHW)


def test_timesteps_are_uniform_and_one_for_each_row() -> None:
    steps = [batch(tensors(), train(4), k, num_train_timesteps=10) for k in range(500)]
    timesteps = torch.stack([rows.timesteps_B for rows in steps])
    assert timesteps.dtype == torch.int64
    counts = torch.bincount(timesteps.flatten(), minlength=10)
    assert len(counts) == 10
    assert counts.min() > 300  # 400 each are expected, deviation 19
    assert (timesteps[:, 0] != timesteps[:, 4]).any()
    noise = torch.stack([rows.noise_BCHW for rows in steps])
    assert noise.mean().abs() < 0.02
    assert (noise.std() - 1).abs() < 0.02


def test_without_a_prior_there_are_instance_rows_only() -> None:
    rows = batch(tensors(num_prior=0), train(3, num_prior=0))
    assert rows.is_prior_B.tolist() == [False] * 3
    assert len(rows.latents_BCHW) == len(rows.timesteps_B) == len(rows.noise_BCHW) == 3
    assert len(rows.conditioning["encoder_hidden_states"]) == 3
    unused = batch(tensors(), train(3, num_prior=0))
    assert torch.equal(unused.latents_BCHW, rows.latents_BCHW)


def test_a_missing_prior_is_refused() -> None:
    with pytest.raises(PriorError, match="subject 'rex' has no prior"):
        batch(tensors(num_prior=0), train())


def test_the_dtype_only_rounds() -> None:
    exact = batch(tensors(std=0.3), train(2))
    half = batch(tensors(std=0.3), train(2), latent_dtype=torch.bfloat16)
    assert half.latents_BCHW.dtype == half.noise_BCHW.dtype == torch.bfloat16
    assert torch.equal(half.latents_BCHW, exact.latents_BCHW.to(torch.bfloat16))
    assert torch.equal(half.noise_BCHW, exact.noise_BCHW.to(torch.bfloat16))
    assert torch.equal(half.timesteps_B, exact.timesteps_B)


def test_permuted_images_carry_their_latents_along() -> None:
    """The same photos in another order are other indices, never other pairs."""
    of = tensors()
    turned = SubjectTensors(
        of.mean_NCHW.flip(0), of.std_NCHW, of.instance_conditioning, of.prior, of.photo_digests
    )
    for step in range(6):
        one, other = batch(of, train(2), step), batch(turned, train(2), step)
        assert torch.equal(one.latents_BCHW[2:], other.latents_BCHW[2:])
        total = one.latents_BCHW[:2] + other.latents_BCHW[:2]
        assert torch.equal(total, torch.full_like(total, 4 * 0.5))


def test_samples_of_other_sizes_are_rows_of_other_batches() -> None:
    """Each sample keeps its own latents, caption and mask, whatever its size."""
    of = tensors(4)
    mask_NHW = torch.rand(4, 2, 2) + 0.1
    sizes = ((2, 2), (1, 2), (2, 1), (1, 2))
    prompt = {"encoder_hidden_states": torch.stack([torch.full((3, 2), v) for v in (0.0, 1.0)])}
    ragged = replace(
        of, size_N=sizes, mask_NHW=mask_NHW, prompt_N=(0, 1, 0, 1), instance_conditioning=prompt
    )
    config = TrainConfig.model_validate({"batch_size": 4, "photos": {"masks": True}})
    batches = make_slot_batches(
        ragged, config, "rex", 7, 0, num_train_timesteps=1000, scaling_factor=1.0
    )
    seen = []
    for rows in batches:
        shape = tuple(rows.latents_BCHW.shape[2:])
        for row in (~rows.is_prior_B).nonzero()[:, 0].tolist():
            sample = int(rows.latents_BCHW[row, 0, 0, 0]) - 1
            seen.append(sample)
            assert sizes[sample] == shape
            assert rows.prompt_B[row] == sample % 2
            assert (rows.conditioning["encoder_hidden_states"][row] == sample % 2).all()
            assert rows.weight_BHW is not None
            own_HW = mask_NHW[sample, : shape[0], : shape[1]]
            torch.testing.assert_close(rows.weight_BHW[row], own_HW / own_HW.mean())
    assert sorted(seen) == [0, 1, 2, 3]
    assert sum(int(rows.is_prior_B.sum()) for rows in batches) == 4


def test_offset_noise_has_a_stream_of_its_own_and_one_value_a_channel() -> None:
    offset = TrainConfig.model_validate({"batch_size": 2, "objective": {"offset_noise": 0.5}})
    plain, moved = batch(tensors(), train(2), 3), batch(tensors(), offset, 3)
    added_BCHW = moved.noise_BCHW - plain.noise_BCHW
    expected = 0.5 * torch.randn((4, 4, 1, 1), generator=stream(7, "rex", 3, "offset noise"))
    torch.testing.assert_close(added_BCHW, expected.expand_as(added_BCHW))
    assert torch.equal(moved.timesteps_B, plain.timesteps_B)
    assert torch.equal(moved.latents_BCHW, plain.latents_BCHW)


def test_base_predictions_rows_are_the_instances_own_under_the_class_prompt() -> None:
    values = {"batch_size": 2, "prior": {"kind": "base_prediction"}}
    config = TrainConfig.model_validate(values)
    of = replace(
        tensors(num_prior=0),
        class_conditioning={"encoder_hidden_states": torch.full((1, 3, 2), PRIOR)},
    )
    rows = batch(of, config, 5)
    assert rows.from_base
    assert rows.is_prior_B.tolist() == [False, False, True, True]
    for tensor in (rows.latents_BCHW, rows.noise_BCHW, rows.timesteps_B):
        assert torch.equal(tensor[:2], tensor[2:])
    signs = rows.conditioning["encoder_hidden_states"][:, 0, 0].tolist()
    assert signs == [INSTANCE, INSTANCE, PRIOR, PRIOR]
    with pytest.raises(PriorError, match="no embedding of its class prompt"):
        batch(tensors(num_prior=0), config)
