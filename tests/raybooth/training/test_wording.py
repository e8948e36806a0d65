"""Text encoders and learned tokens in a pack: the same equivalences, and PEFT with autograd."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tests.raybooth.training.jobs import largest, make_job, relative, spoil
from tests.tiny import write_tiny_sdxl
from torch import Tensor

from raybooth.config import merge
from raybooth.data.batch import make_slot_batch
from raybooth.errors import ConfigError
from raybooth.model.base import Base, encode_prompts, load_base
from raybooth.model.learned import init_tokens
from raybooth.training.job import SlotJob, SlotReport
from raybooth.training.pack import Pack

EXACT = 1e-10
TEXT: dict[str, Any] = {
    "num_train_steps": 4,
    "adapter": {"targets": "attention", "text_targets": "attention", "identifier_tokens": 2},
}


@pytest.fixture(scope="module")
def text64(base64: Base) -> Base:
    """float64 throughout: the text encoders too."""
    encoders = {key: copy.deepcopy(part).double() for key, part in base64.text_encoders.items()}
    return replace(base64, text_encoders=encoders)


@pytest.fixture(scope="module")
def sdxl64(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = write_tiny_sdxl(tmp_path_factory.mktemp("xl") / "xl")
    base = load_base(str(folder), dtype=torch.float64)
    encoders = {key: part.double() for key, part in base.text_encoders.items()}
    return replace(base, text_encoders=encoders)


def _job(base: Base, subject_id: str = "robot", seed: int = 0, **overrides: Any) -> SlotJob:
    """A job whose words are real, one caption for every second photo."""
    job = make_job(subject_id, seed, **merge(TEXT, overrides))
    number = job.train.adapter.identifier_tokens
    name = f"<{subject_id}>" if number else "sks"
    prompts = (f"a photo of {name} dog", f"{name} dog in the snow")
    sizes = base.family.size_conditioning((40, 32), (0, 0), (32, 32))
    prior = job.tensors.prior
    assert prior is not None
    class_prompt = "a photo of a dog"
    tensors = replace(
        job.tensors,
        prompts=prompts,
        prompt_N=(0, 1, 0, 1),
        instance_conditioning=encode_prompts(base, prompts),
        size_conditioning={key: row.expand(4, -1) for key, row in sizes.items()},
        prior=replace(prior, conditioning={**encode_prompts(base, [class_prompt]), **sizes}),
    )
    return replace(job, tensors=tensors, class_noun="dog", class_prompt=class_prompt)


def _jobs(base: Base) -> list[SlotJob]:
    return [
        _job(base, adapter={"text_learning_rate": 5e-3}),
        _job(base, "vase", 1, batch_size=2, adapter={"rank": 2, "alpha": 6.0}, num_train_steps=3),
        _job(base, "cat", 2, prior={"num_images": 0, "loss_weight": 0.0}),
    ]


class Run:
    """Reports and rows of jobs trained together to their ends."""

    def __init__(self, base: Base, jobs: Sequence[SlotJob]) -> None:
        pack = Pack(base, jobs)
        self.reports: dict[str, list[SlotReport]] = {job.job_id: [] for job in jobs}
        while pack.active:
            for report in pack.step():
                self.reports[report.job_id].append(report)
        self.flats = {job.job_id: pack.state(job.job_id).flat_N for job in jobs}
        pack.close()

    def losses(self, job: SlotJob) -> list[float]:
        return [report.loss for report in self.reports[job.job_id]]


@pytest.mark.parametrize("kind", ["text64", "sdxl64"])
def test_a_pack_that_trains_text_is_its_solo_runs(
    kind: str, request: pytest.FixtureRequest
) -> None:
    base: Base = request.getfixturevalue(kind)
    jobs = _jobs(base)
    together = Run(base, jobs)
    for job in jobs:
        alone = Run(base, [job])
        assert relative(together.flats[job.job_id], alone.flats[job.job_id]) <= EXACT
        assert largest(together.losses(job), alone.losses(job)) <= EXACT


@pytest.mark.parametrize("changes", [{}, {"adapter": {"text_targets": None}}])
def test_a_slot_is_peft_on_unet_and_text_encoder_with_a_textual_inversion(
    text64: Base, changes: dict[str, Any]
) -> None:
    """Gradients of one train step against PEFT's layers and a longer embedding table."""
    job = _job(text64, **changes)
    pack = Pack(text64, [job])
    slot = pack.slot(job.job_id)
    with torch.no_grad():  # B is zero at first: no gradient would reach the text encoder's A
        noise = torch.randn(pack.bank.flat_SP.shape[1], dtype=torch.float64)
        pack.bank.flat_SP[slot] += (
            0.05 * noise * (torch.arange(len(noise)) < pack.bank.num_parameters)
        )
    start = pack.adapter(job.job_id)
    tokens = pack.bank.read_tokens(slot)
    batch = make_slot_batch(
        job.tensors,
        job.train,
        job.subject_id,
        job.seed,
        0,
        num_train_timesteps=1000,
        scaling_factor=text64.scaling_factor,
        latent_dtype=torch.float64,
    )
    (report,) = pack.step()
    grad_P = pack.bank.flat_SP.grad
    assert grad_P is not None
    coefficient = min(1.0, 1.0 / (report.grad_norm + 1e-6))  # the step scaled its gradient
    found = pack.bank.unflatten(grad_P[slot] / coefficient, job.train.adapter.rank)
    found_tokens = pack.bank.unflatten_tokens(grad_P[slot] / coefficient)
    pack.close()

    unet, encoder = copy.deepcopy(text64.denoiser), copy.deepcopy(text64.text_encoder)
    pairs = {}
    for module, prefix in ((unet, ""), (encoder, "text_encoder.text_model.")):
        own = [key for key in start if key.startswith("text_encoder") == bool(prefix)]
        if not own:
            continue
        names = [key.removeprefix(prefix) for key in own]
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=names), module)
        for key, name in zip(own, names, strict=True):
            layer: Any = module.get_submodule(name)
            layer.double()
            pairs[key] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            for weight, value in zip(pairs[key], start[key], strict=True):
                weight.data.copy_(value)
    tokenizer = copy.deepcopy(text64.tokenizer)
    tokenizer.add_tokens("<robot>")
    tokenizer.add_tokens("<robot>_1")
    longer: Any = encoder
    longer.resize_token_embeddings(len(tokenizer))
    table: Tensor = longer.get_input_embeddings().weight
    table.data[-2:] = tokens["text_encoder"]
    table.requires_grad_(True)
    place = batch.prompt_B[0]
    said = job.tensors.prompts[place].replace("<robot>", "<robot> <robot>_1")
    ids = tokenizer(
        [said, job.class_prompt], padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    states = longer(ids)[0]
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler.from_config(dict(text64.scheduler_config))
    noisy = scheduler.add_noise(batch.latents_BCHW, batch.noise_BCHW, batch.timesteps_B)
    predicted = unet(noisy, batch.timesteps_B, encoder_hidden_states=states).sample
    error_B = (predicted - batch.noise_BCHW).square().mean((1, 2, 3))
    loss = error_B.sum()
    loss.backward()
    assert report.loss == pytest.approx(loss.item(), rel=1e-10)
    for key, (down, up) in pairs.items():
        assert relative(found[key].down, down.grad) <= 1e-8, key
        assert relative(found[key].up, up.grad) <= 1e-8, key
    assert table.grad is not None
    assert relative(found_tokens["text_encoder"], table.grad[-2:]) <= 1e-8


def test_a_resumed_slot_that_trains_text_goes_on_bit_for_bit(base: Base) -> None:
    """Also in another pack, and with 8-bit states beside two learning rates."""
    eight = {"optimizer": {"name": "adamw8bit"}, "adapter": {"text_learning_rate": 2e-3}}
    for changes in ({}, eight):
        job, other = _job(base, **changes), _job(base, "vase", 1)
        whole = Pack(base, [job])
        for _ in range(2):
            whole.step()
        state = whole.state(job.job_id)
        last = [whole.step()[0] for _ in range(2)]
        expected = whole.state(job.job_id).flat_N
        whole.close()
        again = Pack(base, [job], states={job.job_id: state})
        assert [again.step()[0] for _ in range(2)] == last
        assert torch.equal(again.state(job.job_id).flat_N, expected)
        again.close()
        moved = Pack(base, [other, job], states={job.job_id: state})
        while moved.active:
            moved.step()
        assert relative(moved.state(job.job_id).flat_N, expected) <= 1e-3
        moved.close()


def test_a_nan_stays_in_the_slot_that_trains_text(text64: Base) -> None:
    jobs = _jobs(text64)
    run = Run(text64, [jobs[0], spoil(jobs[1]), jobs[2]])
    assert run.reports[jobs[1].job_id][-1].status == "failed"
    for job in (jobs[0], jobs[2]):
        alone = Run(text64, [job])
        assert run.reports[job.job_id][-1].status == "finished"
        assert relative(run.flats[job.job_id], alone.flats[job.job_id]) <= EXACT


def test_text_moves_at_its_own_rate(base: Base) -> None:
    """AdamW's first step is the learning rate times the gradient's sign."""
    job = _job(base, adapter={"text_learning_rate": 3e-3}, optimizer={"weight_decay": 0.0})
    pack = Pack(base, [job])
    before = pack.bank.flat_SP.detach()[1].clone()
    pack.step()
    moved_P = (pack.bank.flat_SP.detach()[1] - before).abs()
    start = pack.bank.text_start
    pack.close()
    assert moved_P[:start].max() == pytest.approx(1e-3, rel=1e-3)
    assert moved_P[start:].max() == pytest.approx(3e-3, rel=1e-3)


def test_learned_tokens_start_from_the_class_noun_with_seeded_noise(base: Base) -> None:
    draw = [
        init_tokens(base, "dog", 2, torch.Generator().manual_seed(seed))["text_encoder"]
        for seed in (0, 0, 1)
    ]
    (place,) = base.tokenizer("dog", add_special_tokens=False).input_ids
    text_encoder: Any = base.text_encoder
    noun_D = text_encoder.get_input_embeddings().weight[place]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0][0], draw[0][1])
    for token_D in draw[0]:
        assert 0.05 < (token_D - noun_D).norm() / noun_D.norm() < 0.15


def test_training_leaves_the_text_encoder_and_its_prompts_alone(base: Base) -> None:
    prompt = ["a photo of sks dog"]
    before = encode_prompts(base, prompt)["encoder_hidden_states"]
    pack = Pack(base, [_job(base)])
    for _ in range(2):
        pack.step()
        assert torch.equal(encode_prompts(base, prompt)["encoder_hidden_states"], before)
    pack.close()
    assert torch.equal(encode_prompts(base, prompt)["encoder_hidden_states"], before)
    assert len(base.tokenizer) == 556


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("adapter.text_targets", {"adapter": {"text_targets": None}}),
        ("adapter.identifier_tokens", {"adapter": {"identifier_tokens": 1}}),
    ],
)
def test_slots_of_other_words_do_not_share_a_pack(
    name: str, changes: dict[str, Any], base: Base
) -> None:
    with pytest.raises(ConfigError, match=f"share {name}"):
        Pack(base, [_job(base), _job(base, "vase", **changes)])


def test_a_job_without_words_is_refused(base: Base) -> None:
    with pytest.raises(ConfigError, match="without words"):
        Pack(base, [make_job("robot", **TEXT)])


def test_low_precision_trains_text_too(base: Base) -> None:
    full, low = (_job(base, precision=precision) for precision in ("fp32", "bf16"))
    runs = Run(base, [full]), Run(base, [low])
    assert largest(runs[1].losses(low), runs[0].losses(full)) <= 0.03
