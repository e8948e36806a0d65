"""What other trainers get wrong, one test a row of the table of known bugs (row numbers in names).

1 min-SNR weights of instance rows mixed with those of prior rows; 2 class words beside instance
pictures; 3 weights that do not fit when a batch has a prior; 4 latents cached by train step;
5 prompt embeddings that grow in place; 6 attention masks that crash; 7 a resume that starts the
epoch again; 8 prior images known by their number alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raybooth.config import TrainConfig
from raybooth.data.batch import SlotBatch, make_slot_batch, plan_batch
from raybooth.data.prior_key import prior_key
from raybooth.model.base import Base, encode_prompts, load_base
from raybooth.training import objective
from raybooth.training.job import SlotJob
from raybooth.training.pack import Pack
from tests.raybooth.training.jobs import make_job
from tests.tiny import write_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(write_tiny_base(Path(tmp_path_factory.mktemp("bugs")) / "base")))


def draw(job: SlotJob, train_step: int) -> SlotBatch:
    return make_slot_batch(
        job.tensors,
        job.train,
        job.subject_id,
        job.seed,
        train_step,
        num_train_timesteps=1000,
        scaling_factor=1.0,
    )


def weigh(base: Base, timesteps: list[int], gamma: float) -> torch.Tensor:
    """Weights of as many instance rows, then prior rows, of slot 1."""
    alpha_bar_T = objective.alphas_cumprod(base.scheduler_config)
    weights_T = objective.snr_weights(alpha_bar_T, gamma, "epsilon")
    rows = len(timesteps)
    is_prior_B = torch.arange(rows) >= rows // 2
    return objective.row_weights(
        torch.stack([torch.ones_like(weights_T), weights_T]),
        torch.ones(rows, dtype=torch.long),
        torch.tensor(timesteps),
        is_prior_B,
    )


def test_row_1_min_snr_takes_the_instance_timestep(base: Base) -> None:
    """Not the mean with the prior row's weight, which would be 0.524 here."""
    weight_B = weigh(base, [10, 750], 5.0)
    assert weight_B[0].item() == pytest.approx(0.0483057, abs=5e-7)
    assert weight_B[1].item() == 1.0


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_row_2_class_words_stay_with_class_pictures(batch_size: int) -> None:
    job = make_job(batch_size=batch_size)
    assert job.tensors.prior is not None
    batch = draw(job, 0)
    words = {
        False: job.tensors.instance_conditioning["encoder_hidden_states"][0],
        True: job.tensors.prior.conditioning["encoder_hidden_states"][0],
    }
    assert batch.is_prior_B.tolist() == [False] * batch_size + [True] * batch_size
    for is_prior, states in zip(
        batch.is_prior_B.tolist(), batch.conditioning["encoder_hidden_states"], strict=True
    ):
        assert torch.equal(states, words[is_prior])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_row_3_weights_fit_a_batch_with_a_prior(batch_size: int, base: Base) -> None:
    """One weight a row, whatever the batch; a whole step too."""
    timesteps = [100] * batch_size + [900] * batch_size
    weight_B = weigh(base, timesteps, 5.0)
    assert weight_B.tolist() == pytest.approx(
        [0.591445] * batch_size + [1.0] * batch_size, abs=1e-6
    )
    pack = Pack(base, [make_job(batch_size=batch_size, objective={"snr_gamma": 5.0})])
    (report,) = pack.step()
    pack.close()
    assert report.loss == pytest.approx(report.instance_loss + report.prior_loss, rel=1e-6)


def test_row_4_latents_are_those_of_the_planned_picture() -> None:
    job = make_job(batch_size=3)
    assert job.tensors.prior is not None
    sure = replace(
        job.tensors,
        std_NCHW=torch.zeros_like(job.tensors.std_NCHW),
        prior=replace(job.tensors.prior, std_NCHW=torch.zeros_like(job.tensors.prior.std_NCHW)),
    )
    job = replace(job, tensors=sure)
    for train_step in range(6):
        plan = plan_batch(job.seed, job.subject_id, train_step, 3, 4, 5)
        batch = draw(job, train_step)
        assert sure.prior is not None
        expected = [sure.mean_NCHW[i] for i in plan.instance_indices]
        expected += [sure.prior.mean_NCHW[i] for i in plan.prior_indices]
        assert torch.equal(batch.latents_BCHW, torch.stack(expected))


def test_row_5_prompt_embeddings_do_not_grow() -> None:
    job = make_job(batch_size=2)
    assert job.tensors.prior is not None
    kept = {**job.tensors.instance_conditioning, "class": job.tensors.prior.conditioning}
    before = {k: v.clone() for k, v in job.tensors.instance_conditioning.items()}
    for train_step in range(4):
        assert draw(job, train_step).conditioning["encoder_hidden_states"].shape[0] == 4
    for name, tensor in before.items():
        assert torch.equal(kept[name], tensor)
        assert kept["class"][name].shape[0] == 1


def test_row_6_attention_masks_are_used(base: Base) -> None:
    prompts = ["a photo of sks dog", "a photo of a red dog on the beach"]
    plain = encode_prompts(base, prompts)["encoder_hidden_states"]
    config: Any = base.text_encoder.config
    config.use_attention_mask = True
    try:
        masked = encode_prompts(base, prompts)["encoder_hidden_states"]
        alone = [encode_prompts(base, [prompt])["encoder_hidden_states"] for prompt in prompts]
    finally:
        del config.use_attention_mask
    assert torch.equal(masked, torch.cat(alone))
    assert masked.shape == plain.shape
    assert not torch.allclose(masked, plain)


@pytest.mark.parametrize("begin", [1, 2, 3])
def test_row_7_a_resume_goes_on_within_its_epoch(begin: int) -> None:
    """Four photos, one a train step: what is left of the epoch is what had not been seen."""
    epoch = [plan_batch(3, "rex", step, 1, 4, 0).instance_indices[0] for step in range(4)]
    assert sorted(epoch) == [0, 1, 2, 3]
    resumed = [plan_batch(3, "rex", step, 1, 4, 0).instance_indices[0] for step in range(begin, 4)]
    assert not set(resumed) & set(epoch[:begin])


def test_row_8_a_prior_is_known_by_all_that_made_it() -> None:
    """The same number of pictures from another recipe is another prior."""
    changes: list[dict[str, Any]] = [
        {},
        {"prior": {"guidance_scale": 3.0}},
        {"prior": {"num_inference_steps": 20}},
        {"prior": {"solver": "euler"}},
        {"prior": {"negative_prompt": "blurred"}},
        {"resolution": 256},
        {"precision": "bf16"},
    ]
    trains = [TrainConfig.model_validate(change) for change in changes]
    keys = [prior_key(train, "a photo of a dog", "base").digest for train in trains]
    keys.append(prior_key(trains[0], "a photo of a cat", "base").digest)
    keys.append(prior_key(trains[0], "a photo of a dog", "other base").digest)
    assert len(set(keys)) == len(keys)
    assert prior_key(trains[0], "a photo of a dog", "base").digest == keys[0]
