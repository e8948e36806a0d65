"""Validation of a full run: the first worker measures a copy, and all learn whether to go on.

A run's weights may lie in pieces with all workers (ZeRO 3), and DeepSpeed's hooks meet the others
in every forward. So the workers gather the weights together, the first puts them into a second
base, which no hook knows, and measures that; the others wait for its word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from raybooth.data.encode import SubjectTensors
from raybooth.errors import RayBoothError
from raybooth.model.base import Base
from raybooth.model.full_weights import trained_parts
from raybooth.model.resting import awake
from raybooth.model.sampler import generate
from raybooth.training.full import FullModel, FullRun
from raybooth.training.full_rows import FullRows
from raybooth.training.held_out import fixed_batches
from raybooth.training.watched import Images, ValidationTask, Watched, sample_requests
from raybooth.validation_record import ValidationRecord

Parts = Mapping[str, Mapping[str, Tensor]]
Result = TypeVar("Result")


class FullValidation:
    """One full run as it is watched; every worker of the process group calls every method."""

    def __init__(self, base: Base, task: ValidationTask, root: Path) -> None:
        """`root`/<job_id>/validation holds the history; encoders are the first worker's alone."""
        self._base, self._task = base, task
        self._watched = Watched(task, root)
        self._is_first = dist.get_rank() == 0
        self._copy: _Copy | None = None

    def start(self, train_step: int) -> bool:
        """Take up the history from this train step on; whether patience had run out by then.

        Call it before the run is made: the base has its own weights then.
        """

        def begin() -> bool:
            self._watched.resume(train_step)
            self._copy = _Copy(self._base, self._task)
            return self._watched.is_over

        return self._agreed(begin)

    def after_step(self, run: FullRun) -> bool:
        """Measure the run if it is due; whether patience ran out."""
        if not self._watched.is_due(run.train_step, is_last=run.is_finished):
            return False
        weights = run.weights()

        def measure() -> bool:
            assert self._copy is not None
            with self._copy.wearing(weights, run.train_step):
                self._watched.measure(self._copy)
            return self._watched.is_over

        return self._agreed(measure)

    def settle(self, weights: Parts) -> dict[str, dict[str, Tensor]]:
        """What is to be published: these weights, the last ones, or those of the best point."""
        best = self._watched.best_weights() if self._is_first else None
        if best is None:
            return {part: dict(state) for part, state in weights.items()}
        return {
            part: {name: best[f"{part}/{name}"] for name in state}
            for part, state in weights.items()
        }

    def record(self) -> ValidationRecord:
        """What goes into the published record; for the first worker."""
        return self._watched.record()

    def pictures(self) -> dict[str, Path]:
        """Each validation's samples, as files to publish; for the first worker."""
        return self._watched.pictures()

    def _agreed(self, action: Callable[[], Result]) -> Result:
        """What the first worker's action returns; its error is raised by all."""
        said: list[Any] = [None, None]
        if self._is_first:
            try:
                said[0] = action()
            except (RayBoothError, OSError) as error:
                said[1] = error
        dist.broadcast_object_list(said, src=0)
        if said[1] is not None:
            raise said[1]
        return cast(Result, said[0])


class _Copy:
    """The base a second time, in the run's weights; on the host between two validations."""

    def __init__(self, base: Base, task: ValidationTask) -> None:
        train, config = task.job.train, task.job.train.validation
        self._job = task.job
        self._of_base: Images = []
        if config.image_encoder is not None:
            prompts = [task.class_prompt] * config.class_images
            self._of_base = generate(base, None, sample_requests(task.job, prompts, of_base=True))
        texts = deepcopy(base.text_encoders) if train.full.text_encoder else base.text_encoders
        self._base = replace(base, denoiser=deepcopy(base.denoiser), text_encoders=texts)
        plain = train.model_copy(update={"gradient_checkpointing": False})
        self._model = FullModel(self._base, plain).requires_grad_(False).cpu()
        self._rows = FullRows(base, task.job)
        self._step, self._weights = 0, cast(Parts, {})

    @contextmanager
    def wearing(self, weights: Parts, train_step: int) -> Iterator[None]:
        """The run as it stands, on its device, for as long as the context lasts."""
        parts = trained_parts(self._base, text_encoder=True)
        for part, state in weights.items():
            parts[part].load_state_dict(state, strict=True)
        self._step, self._weights = train_step, weights
        self._base.denoiser.to(self._base.device)
        try:
            yield
        finally:
            self._base.denoiser.cpu()
            self._weights = {}

    @property
    def train_step(self) -> int:
        return self._step

    @torch.no_grad()
    def loss(self, tensors: SubjectTensors) -> float:
        losses = []
        with awake(self._base):
            for batches in fixed_batches(self._base, self._job, tensors, torch.float32):
                count = sum(len(batch.is_prior_B) for batch in batches)
                for batch in batches:
                    rows = replace(batch, conditioning=self._rows.conditioning(batch))
                    error_B = self._rows.errors(self._model, rows).cpu()
                    losses.append(float((error_B * self._rows.weights(batch, count, 0)).sum()))
        return sum(losses) / self._job.train.validation.num_timesteps

    def draw(self, prompts: Sequence[str]) -> Images:
        return generate(self._base, None, sample_requests(self._job, prompts, of_base=False))

    def draw_base(self, prompts: Sequence[str]) -> Images:
        assert len(prompts) == len(self._of_base)
        return self._of_base

    def weights(self) -> dict[str, Tensor]:
        return {
            f"{part}/{name}": value
            for part, state in self._weights.items()
            for name, value in state.items()
        }
