"""Packed against solo against PEFT, and the ceiling: the frozen base alone on as many rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from raybooth.config import TrainConfig, find_config, load_config
from raybooth.data.encode import SubjectTensors
from raybooth.data.prior import PriorTensors
from raybooth.model.base import Base, encode_prompts, load_base, predict
from raybooth.model.lora import PRESETS
from raybooth.training.job import SlotJob
from raybooth.training.pack import Pack
from tests.bench.rounds import BenchReport, Contender, measure

STEPS = 4
"""Train steps of one turn."""
SIZES = (1, 2, 4, 8)


def run(rounds: int) -> list[BenchReport]:
    """Subject-steps per second on the pocket base, rank and rows of configs/train/pocket-lora."""
    base = load_base("pocket")
    train = load_config(TrainConfig, find_config("train", "pocket-lora"))
    train = train.model_copy(update={"num_train_steps": 1_000_000})
    jobs = [draw_job(base, train, index) for index in range(max(SIZES))]
    contenders = [Contender("PEFT, one subject", _peft(base, train, jobs[0]), STEPS)]
    for size in SIZES:
        contenders.append(Contender(f"pack of {size}", _pack(train, jobs[:size]), STEPS * size))
    rows = 2 * train.batch_size * max(SIZES)
    ceiling = Contender(f"base alone, {rows} rows", _ceiling(base, rows), STEPS * max(SIZES))
    title = (
        f"Training: subject-steps/s, rank {train.adapter.rank}, {2 * train.batch_size} rows each"
    )
    notes = [
        "The ceiling runs the frozen base forward and backward to its input, without adapters."
    ]
    command = "python -m tests.bench training"
    everyone = [*contenders, ceiling]
    reference = contenders[0].name
    return [measure(title, "subject-steps/s", everyone, reference, rounds, command, notes)]


def draw_job(base: Base, train: TrainConfig, index: int) -> SlotJob:
    side = train.resolution // base.vae_scale_factor
    generator = torch.Generator().manual_seed(index)
    shape = (base.latent_channels, side, side)

    def posterior(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, *shape, generator=generator), torch.full((count, *shape), 0.1)

    prior = PriorTensors(
        *posterior(train.prior.num_images),
        conditioning=encode_prompts(base, ["a photo of a dog"]),
        image_digests=(),
    )
    instance = encode_prompts(base, ["a photo of sks dog"])
    tensors = SubjectTensors(*posterior(5), instance, prior, ())
    return SlotJob(f"job-{index}", f"subject-{index}", index, train, tensors)


def _pack(train: TrainConfig, jobs: list[SlotJob]) -> Callable[[], None]:
    pack = Pack(load_base("pocket"), jobs)

    def turn() -> None:
        for _ in range(STEPS):
            pack.step()

    return turn


def _peft(base: Base, train: TrainConfig, job: SlotJob) -> Callable[[], None]:
    """The inner loop of diffusers' DreamBooth LoRA script, with latents and embeddings cached."""
    unet = UNet2DConditionModel.from_pretrained(base.folder, subfolder="unet").float()
    unet.requires_grad_(False)
    names = [name for name, _ in unet.named_modules()]
    targets = [t for t in PRESETS["all"] if any(name.endswith(t) for name in names)]
    rank = train.adapter.rank
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    )
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=train.optimizer.learning_rate)
    assert job.tensors.prior is not None
    instance, prior, rows = job.tensors, job.tensors.prior, train.batch_size
    instance_ids = instance.instance_conditioning["encoder_hidden_states"].expand(rows, -1, -1)
    prior_ids = prior.conditioning["encoder_hidden_states"].expand(rows, -1, -1)
    conditioning = torch.cat([instance_ids, prior_ids])

    def turn() -> None:
        for _ in range(STEPS):
            picks = torch.randint(len(instance.mean_NCHW), (rows,))
            prior_picks = torch.randint(len(prior.mean_NCHW), (rows,))
            latents = torch.cat([instance.mean_NCHW[picks], prior.mean_NCHW[prior_picks]])
            noise = torch.randn_like(latents)
            timesteps = torch.randint(1000, (2 * rows,))
            error = unet(latents + noise, timesteps, conditioning).sample - noise
            per_row = error.square().mean((1, 2, 3))
            loss = per_row[:rows].mean() + per_row[rows:].mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    return turn


def _ceiling(base: Base, rows: int) -> Callable[[], None]:
    side = base.native_resolution // base.vae_scale_factor
    latents = torch.randn(rows, base.latent_channels, side, side, requires_grad=True)
    embedding = encode_prompts(base, ["a photo of a dog"])["encoder_hidden_states"]
    conditioning = {"encoder_hidden_states": embedding.expand(rows, -1, -1)}
    timesteps = torch.randint(1000, (rows,))

    def turn() -> None:
        for _ in range(STEPS):
            predict(base, latents, timesteps, conditioning).square().mean().backward()

    return turn
