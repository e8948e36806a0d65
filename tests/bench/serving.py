"""Mixed-subject images/s: one batch for all against diffusers with set_adapters per request."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from raybooth.model.bank import Bank
from raybooth.model.base import Base, load_base
from raybooth.model.lora import AdapterTensors, LoraPair, Site, find_sites, save_adapter
from raybooth.model.sampler import SampleRequest, generate
from tests.bench.rounds import BenchReport, Contender, measure

SUBJECTS = 8
STEPS = 10
RANK = 16
PROMPT = "a photo of sks robot on the beach"


def run(rounds: int) -> list[BenchReport]:
    """Eight requests of eight subjects, rank 16 on all layers, guidance 3, ten denoise steps."""
    base = load_base("pocket")
    sites = find_sites(base.denoiser, "all")
    adapters = [_adapter(sites, seed) for seed in range(SUBJECTS)]
    bank = Bank(base.denoiser, sites=sites, rank=RANK, num_slots=SUBJECTS, device="cpu")
    for slot, adapter in enumerate(adapters, 1):
        bank.write(slot, adapter)
    mixed = [_request(slot) for slot in range(1, SUBJECTS + 1)]
    null = [_request(0) for _ in range(SUBJECTS)]

    def ours(requests: list[SampleRequest], rows: int) -> Callable[[], None]:
        return lambda: generate(base, bank, requests, max_rows=rows) and None

    pipe = _pipeline(base, adapters)
    contenders = [
        Contender("diffusers, set_adapters for each request", _swapping(pipe), SUBJECTS),
        Contender("bank, one request at a time", ours(mixed, 1), SUBJECTS),
        Contender("bank, eight subjects in one batch", ours(mixed, SUBJECTS), SUBJECTS),
        Contender("base alone, eight rows (the ceiling)", ours(null, SUBJECTS), SUBJECTS),
    ]
    title = f"Serving: images/s, {SUBJECTS} requests of {SUBJECTS} subjects, {STEPS} denoise steps"
    command = "python -m tests.bench serving"
    notes = ["diffusers holds all adapters in memory; nobody reads the disk within a turn."]
    return [measure(title, "images/s", contenders, contenders[0].name, rounds, command, notes)]


def _adapter(sites: tuple[Site, ...], seed: int) -> AdapterTensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: LoraPair(
            torch.randn(site.down_shape(RANK), generator=generator) / RANK,
            torch.randn(site.up_shape(RANK), generator=generator) / 1000,
        )
        for site in sites
    }


def _request(slot: int) -> SampleRequest:
    return SampleRequest(
        PROMPT, seed=slot, num_inference_steps=STEPS, guidance_scale=3.0, slot=slot
    )


def _pipeline(base: Base, adapters: list[AdapterTensors]) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(base.folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with tempfile.TemporaryDirectory() as folder:
        for index, adapter in enumerate(adapters):
            path = Path(folder) / f"{index}.safetensors"
            save_adapter(path, adapter, 1.0)
            pipe.load_lora_weights(str(path), adapter_name=f"subject-{index}")
    return pipe


def _swapping(pipe: Any) -> Callable[[], None]:
    def turn() -> None:
        for index in range(SUBJECTS):
            pipe.set_adapters(f"subject-{index}")
            generator = torch.Generator().manual_seed(index)
            pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=3.0, generator=generator)

    return turn
