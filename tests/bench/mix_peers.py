"""What others do with requests of many subjects, each in the best form that we know of.

All have their adapters in memory and are given the prompts' embeddings; none reads a disk or
encodes a text on the clock. A batch is closed when it starts, and is of at most MAX_ROWS images.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.model import _adapter_names_pre_forward_hook
from torch import Tensor

from raybooth.model.base import Base
from tests.bench.arrivals import Arrival, CpuClock, Ran, Served

MAX_ROWS = 16
STEPS = 10
GUIDANCE = 3.0
PROMPT = "a photo of sks robot on the beach"
COPY_ABOVE = 16
"""More adapters than this are swapped by copy (hotswap): set_adapters takes 18 CPU ms where 16 are
loaded and 71 ms where 64 are, a copy 23 ms."""

State = dict[str, Tensor]


class System(Protocol):
    """One way of serving; `run` serves all arrivals on a clock of its own."""

    name: str

    def run(self, arrivals: Sequence[Arrival]) -> Ran: ...


class Peer:
    """A loop around a pipeline: the oldest request, and those that may share its batch."""

    name: str

    def __init__(self, base: Base) -> None:
        self.pipe = plain_pipeline(base)
        with torch.no_grad():
            self.embeds = self.pipe.encode_prompt(PROMPT, "cpu", 1, True)

    def run(self, arrivals: Sequence[Arrival]) -> Ran:
        """Serve them in order of arrival."""
        self.prepare({each.subject for each in arrivals})
        clock, pending, served = CpuClock(), list(arrivals), list[Served]()
        while pending:
            clock.skip_to(pending[0].at_s)
            arrived = [each for each in pending if each.at_s <= clock.now()]
            batch = self.batch(arrived)[:MAX_ROWS]
            pending = [each for each in pending if each not in batch]
            served += self._serve(batch, clock)
        return Ran(served, clock.busy())

    def prepare(self, subjects: set[int]) -> None:
        """Have their adapters in memory, before the clock starts."""

    def batch(self, arrived: Sequence[Arrival]) -> list[Arrival]:
        """Of those waiting, in order of arrival: who goes now. Here the oldest's own subject."""
        return [each for each in arrived if each.subject == arrived[0].subject]

    @contextmanager
    def ready(self, batch: Sequence[Arrival]) -> Iterator[None]:
        """The pipeline as the batch needs it."""
        raise NotImplementedError

    def _serve(self, batch: Sequence[Arrival], clock: CpuClock) -> list[Served]:
        stepped: list[float] = []

        def on_step(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> Any:
            stepped.append(clock.now())
            return values

        cond, uncond = self.embeds
        with self.ready(batch):
            images = self.pipe(
                prompt_embeds=cond.expand(len(batch), -1, -1),
                negative_prompt_embeds=uncond.expand(len(batch), -1, -1),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=[torch.Generator().manual_seed(each.seed) for each in batch],
                callback_on_step_end=on_step,
            ).images
        served = []
        for each, image in zip(batch, images, strict=True):
            file = io.BytesIO()
            image.save(file, "PNG")
            first_s, done_s = stepped[0] - each.at_s, clock.now() - each.at_s
            served.append(Served(each, first_s, done_s, file.getvalue()))
        return served


class Swapping(Peer):
    """(a) One pipeline; the adapter is changed between batches, where it differs."""

    name = "diffusers, swapping adapters"

    def __init__(self, base: Base, states: Sequence[State]) -> None:
        super().__init__(base)
        self.states = states
        self._by_copy = len(states) > COPY_ABOVE
        self._active = -1
        for index, state in enumerate(states[:1] if self._by_copy else states):
            self.pipe.load_lora_weights(dict(state), adapter_name=_name(index))

    @contextmanager
    def ready(self, batch: Sequence[Arrival]) -> Iterator[None]:
        """Its subject's adapter active."""
        subject = batch[0].subject
        if subject != self._active and self._by_copy:
            state = dict(self.states[subject])
            self.pipe.load_lora_weights(state, adapter_name=_name(0), hotswap=True)
        elif subject != self._active:
            self.pipe.set_adapters(_name(subject))
        self._active = subject
        yield


class Merged(Peer):
    """(b) A denoiser with the adapter fused into its weights for every subject, all in memory."""

    name = "merged pipelines, all in memory"

    def __init__(self, base: Base, states: Sequence[State]) -> None:
        super().__init__(base)
        self.states = states
        self.plain = self.pipe.unet
        self.denoisers: dict[int, Any] = {}

    def prepare(self, subjects: set[int]) -> None:
        """Fuse those that are not; they stay."""
        for subject in sorted(subjects - self.denoisers.keys()):
            self.pipe.unet = copy.deepcopy(self.plain)
            self.pipe.load_lora_weights(dict(self.states[subject]), adapter_name=_name(0))
            self.pipe.fuse_lora()
            self.pipe.unload_lora_weights()
            self.denoisers[subject] = self.pipe.unet

    @contextmanager
    def ready(self, batch: Sequence[Arrival]) -> Iterator[None]:
        """Its subject's denoiser in the pipeline."""
        self.pipe.unet = self.denoisers[batch[0].subject]
        yield


class MixedByPeft(Peer):
    """(c) PEFT's `adapter_names`: subjects share a batch, each layer does them one by one.

    diffusers ignores adapter_names, so PEFT's own hook goes onto PEFT's layers here.
    """

    name = "PEFT's mixed batch"

    def __init__(self, base: Base, states: Sequence[State]) -> None:
        super().__init__(base)
        self.states = states
        self.loaded: set[int] = set()
        self.layers: list[LoraLayer] = []

    def prepare(self, subjects: set[int]) -> None:
        """Load those that are not; they stay, and cost nothing while no row is theirs."""
        for subject in sorted(subjects - self.loaded):
            state = dict(self.states[subject])
            self.pipe.load_lora_weights(state, adapter_name=_name(subject))
        self.loaded |= subjects
        modules = self.pipe.unet.modules()
        self.layers = [module for module in modules if isinstance(module, LoraLayer)]

    def batch(self, arrived: Sequence[Arrival]) -> list[Arrival]:
        """Whoever waits."""
        return list(arrived)

    @contextmanager
    def ready(self, batch: Sequence[Arrival]) -> Iterator[None]:
        """Every layer told whose rows they are: the unconditional half, then the conditional."""
        names = [_name(each.subject) for each in batch] * 2
        hook = partial(_adapter_names_pre_forward_hook, adapter_names=names)
        hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in self.layers]
        yield
        for each in hooks:
            each.remove()


def plain_pipeline(base: Base) -> Any:
    """diffusers' own pipeline of `base`, fp32, DPM-Solver++(2M)."""
    pipe = StableDiffusionPipeline.from_pretrained(base.folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def _name(index: int) -> str:
    return f"subject-{index}"
