"""The slow flat truth: one subject, PEFT's LoRA, torch's AdamW and clipping, a plain loop.

Nothing of the bank, the pack or the slot optimiser is used here, so that tests can trust it.
Shapes: B rows of a train step, C H W latents.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raybooth.config import TrainConfig
from raybooth.data.batch import SlotBatch, make_slot_batches, stream
from raybooth.data.encode import SubjectTensors
from raybooth.errors import ConfigError
from raybooth.model.base import Base
from raybooth.model.lora import AdapterTensors, LoraPair, find_sites, init_pair


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """The trained adapter and what each train step reported."""

    adapter: AdapterTensors
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]


def train_subject(
    base: Base,
    tensors: SubjectTensors,
    train: TrainConfig,
    subject_id: str,
    seed: int,
    steps: int | None = None,
) -> ReferenceRun:
    """`steps` (or all) train steps of one subject on a copy of the base's denoiser.

    Written for bases of the Stable Diffusion 1.x / 2.x family in fp32 or fp64 with AdamW.
    """
    if train.precision != "fp32" or train.optimizer.name != "adamw":
        found = f"precision {train.precision}, optimizer {train.optimizer.name}"
        raise ConfigError("the reference trains in full precision with AdamW", found)
    denoiser, pairs = _with_lora(base, train, subject_id, seed)
    parameters = [part for pair in pairs.values() for part in pair]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=train.optimizer.learning_rate,
        betas=train.optimizer.betas,
        eps=train.optimizer.eps,
        weight_decay=train.optimizer.weight_decay,
        foreach=False,
    )
    schedule = _schedule(optimizer, train)
    losses: list[float] = []
    grad_norms: list[float] = []
    for train_step in range(train.num_train_steps if steps is None else steps):
        optimizer.zero_grad()
        loss = _loss(base, denoiser, tensors, train, subject_id, seed, train_step)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(parameters, train.optimizer.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        grad_norms.append(norm.item())
    adapter = {
        name: LoraPair(pair.down.detach().clone(), pair.up.detach().clone())
        for name, pair in pairs.items()
    }
    return ReferenceRun(adapter, tuple(losses), tuple(grad_norms))


def _loss(
    base: Base,
    denoiser: nn.Module,
    tensors: SubjectTensors,
    train: TrainConfig,
    subject_id: str,
    seed: int,
    train_step: int,
) -> Tensor:
    """Loss of one train step: each latent size is predicted by itself, then all rows are one."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    config = dict(base.scheduler_config)
    if train.objective.zero_terminal_snr:
        config["rescale_betas_zero_snr"] = True
    scheduler = DDPMScheduler.from_config(config)
    batches = make_slot_batches(
        tensors,
        train,
        subject_id,
        seed,
        train_step,
        num_train_timesteps=scheduler.config.num_train_timesteps,
        scaling_factor=base.scaling_factor,
        latent_dtype=base.dtype,
    )
    rows = [_errors(base, denoiser, scheduler, batch, train) for batch in batches]
    instance_B = torch.cat([instance for instance, _ in rows])
    prior_B = torch.cat([prior for _, prior in rows])
    loss = instance_B.mean()
    if len(prior_B):
        loss = loss + train.prior.loss_weight * prior_B.mean()
    return loss


def _errors(
    base: Base, denoiser: nn.Module, scheduler: Any, batch: SlotBatch, train: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Weighted errors of the instance rows, errors of the prior rows."""
    x0_BCHW, noise_BCHW = batch.latents_BCHW.to(base.device), batch.noise_BCHW.to(base.device)
    t_B, is_prior_B = batch.timesteps_B.to(base.device), batch.is_prior_B
    cond = {name: rows.to(base.device, base.dtype) for name, rows in batch.conditioning.items()}
    noisy_BCHW = scheduler.add_noise(x0_BCHW, noise_BCHW, t_B)
    target_BCHW = noise_BCHW
    if base.prediction_type == "v_prediction":
        target_BCHW = scheduler.get_velocity(x0_BCHW, noise_BCHW, t_B)
    if batch.from_base:
        with torch.no_grad():
            asked_BCHW = base.family.predict(base.denoiser, noisy_BCHW, t_B, cond)
        target_BCHW = torch.where(is_prior_B[:, None, None, None], asked_BCHW, target_BCHW)
    predicted_BCHW = base.family.predict(denoiser, noisy_BCHW, t_B, cond)
    square_BCHW = (predicted_BCHW - target_BCHW).square()
    if batch.weight_BHW is not None:
        square_BCHW = square_BCHW * batch.weight_BHW[:, None]
    error_B = square_BCHW.mean((1, 2, 3))
    instance_B, prior_B = error_B[~is_prior_B], error_B[is_prior_B]
    if train.objective.snr_gamma is not None:
        weight_B = _snr_weights(scheduler, t_B[~is_prior_B], train, base.prediction_type)
        instance_B = instance_B * weight_B
    return instance_B, prior_B


def _snr_weights(scheduler: Any, t_B: Tensor, train: TrainConfig, kind: str) -> Tensor:
    """As diffusers' scripts write it: `train_dreambooth.py`, and `_sdxl.py` for `plus_one`."""
    from diffusers.training_utils import compute_snr

    snr_B: Tensor = compute_snr(scheduler, t_B)
    least_B = snr_B.clamp(max=train.objective.snr_gamma)
    if kind == "epsilon":
        return least_B / snr_B
    if train.objective.velocity_weight == "plus_one":
        return torch.where(snr_B > 0, least_B / snr_B, 1.0) + 1
    return least_B / (snr_B + 1)


def _with_lora(
    base: Base, train: TrainConfig, subject_id: str, seed: int
) -> tuple[nn.Module, dict[str, LoraPair]]:
    """A copy of the denoiser under PEFT, with the pack's initial tensors."""
    from peft import LoraConfig, inject_adapter_in_model

    sites = find_sites(base.denoiser, train.adapter.targets)
    rank = train.adapter.rank
    config = LoraConfig(
        r=rank,
        lora_alpha=train.adapter.scale * rank,
        target_modules=[site.name for site in sites],
        init_lora_weights="gaussian",
    )
    denoiser = copy.deepcopy(base.denoiser).requires_grad_(False)
    inject_adapter_in_model(config, denoiser)
    generator = stream(seed, subject_id, 0, "init")
    pairs: dict[str, LoraPair] = {}
    for site in sites:
        module: Any = denoiser.get_submodule(site.name)
        down: Tensor = module.lora_A["default"].to(base.device, base.dtype).weight
        up: Tensor = module.lora_B["default"].to(base.device, base.dtype).weight
        initial = init_pair(site, rank, generator)
        with torch.no_grad():
            down.copy_(initial.down)
            up.copy_(initial.up)
        pairs[site.name] = LoraPair(down, up)
    return denoiser, pairs


def _schedule(
    optimizer: torch.optim.Optimizer, train: TrainConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    from diffusers.optimization import get_scheduler

    name = train.optimizer.schedule
    schedule: torch.optim.lr_scheduler.LambdaLR = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=train.optimizer.warmup_steps,
        num_training_steps=train.num_train_steps,
    )
    return schedule
