"""Validation between train steps: fixed noise, fixed seeds, nothing of the training is touched.

Every point is a function of (the slot's weights, seed, subject), so a resumed training finds the
same points and the same best one. History and best weights lie beside the checkpoints.

N images or samples, D features, T timesteps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from raybooth.config import PriorConfig, TrainConfig
from raybooth.data.batch import make_slot_batches
from raybooth.data.encode import SubjectTensors
from raybooth.data.images import load_photo
from raybooth.data.whole_file import write_whole
from raybooth.encoders import ClipEncoder, ImageEncoder
from raybooth.evaluation import mean_cosine, mean_pairwise_cosine
from raybooth.model.base import Base
from raybooth.model.sampler import SampleRequest, generate
from raybooth.training.job import SlotJob, SlotReport
from raybooth.training.pack import Pack
from raybooth.validation_record import ValidationPoint, ValidationRecord

Images = Sequence[Image.Image]
HISTORY = "history.json"
KEPT_BESTS = 3
MOST_ROWS = 16
"""Images of one forward of the loss."""


@dataclass(frozen=True)
class ValidationTask:
    """What is measured of one job."""

    job: SlotJob
    held_out: SubjectTensors | None = None
    """None: the loss is that of the instance images."""
    prompts: tuple[str, ...] = ()
    plain_prompts: tuple[str, ...] = ()
    """The prompts without the identifier, for a CLIP."""
    class_prompt: str = ""
    photos: tuple[Path, ...] = ()
    """The instance images that likeness is measured to."""
    image_encoder: ImageEncoder | None = None
    clip: ClipEncoder | None = None


class Validation:
    """All validated jobs of one pack; the loop tells it of every train step."""

    def __init__(
        self,
        base: Base,
        tasks: Sequence[ValidationTask],
        root: Path,
        on_point: Callable[[str, ValidationPoint, Images], None] = lambda job_id, point, images: (
            None
        ),
    ) -> None:
        """`root`/<job_id>/validation holds the history; `on_point` gets every new point."""
        self._jobs = {task.job.job_id: _Watched(base, task, root) for task in tasks}
        self._on_point = on_point

    def resume(self, pack: Pack) -> None:
        """Take up the history of every slot from where its weights stand; ends what had ended."""
        for job_id, watched in self._jobs.items():
            watched.resume(pack.state(job_id).train_step)
            if watched.is_over and job_id in pack.active:
                pack.finish(job_id)

    def after_step(self, pack: Pack, reports: Sequence[SlotReport]) -> list[SlotReport]:
        """Measure the slots that are due; the reports, `finished` where patience ran out."""
        told = []
        for report in reports:
            watched = self._jobs.get(report.job_id)
            if watched is not None and watched.is_due(report):
                point, images = watched.measure(pack)
                self._on_point(report.job_id, point, images)
                if watched.is_over and report.status == "running":
                    report = replace(report, status=pack.finish(report.job_id))
            told.append(report)
        return told

    def settle(self, pack: Pack, job_id: str) -> None:
        """Put the weights that are to be published into the finished job's slot."""
        watched = self._jobs.get(job_id)
        if watched is not None:
            watched.settle(pack)

    def record(self, job_id: str) -> ValidationRecord | None:
        """What goes into the published record; None for a job that is not validated."""
        watched = self._jobs.get(job_id)
        return None if watched is None else watched.record()

    def pictures(self, job_id: str) -> dict[str, Path]:
        """Each validation's samples, as files to publish, in order."""
        watched = self._jobs.get(job_id)
        return {} if watched is None else watched.pictures()


def hold_out(tensors: SubjectTensors, count: int) -> tuple[SubjectTensors, SubjectTensors | None]:
    """(all but the last `count` photos, those photos); crops of one photo stay together."""
    num_photos = len(tensors.photo_digests)
    assert 0 <= count < num_photos
    if count == 0:
        return tensors, None
    each = len(tensors.mean_NCHW) // num_photos
    cut = (num_photos - count) * each
    return _part(tensors, slice(None, cut), slice(None, -count)), _part(
        tensors, slice(cut, None), slice(-count, None)
    )


def fixed_loss(base: Base, pack: Pack, job: SlotJob, tensors: SubjectTensors) -> float:
    """Mean instance loss of every image at T fixed timesteps, each with noise of its own.

    Neither noise nor timestep depends on the train step or on the pack.
    """
    config = job.train.validation
    rows = min(len(tensors.mean_NCHW), MOST_ROWS)
    no_prior = PriorConfig(num_images=0, loss_weight=0)
    train = job.train.model_copy(update={"batch_size": rows, "prior": no_prior})
    total = base.num_train_timesteps
    losses = []
    for place in range(config.num_timesteps):
        timestep = (2 * place + 1) * total // (2 * config.num_timesteps)
        batches = make_slot_batches(
            tensors,
            train,
            f"validation/{job.subject_id}",
            job.seed,
            place,
            num_train_timesteps=total,
            scaling_factor=base.scaling_factor,
            latent_dtype=pack.bank.flat_SP.dtype,
        )
        fixed = [
            replace(batch, timesteps_B=torch.full_like(batch.timesteps_B, timestep))
            for batch in batches
        ]
        losses.append(pack.instance_loss(job.job_id, fixed))
    return sum(losses) / len(losses)


@dataclass
class _Watched:
    """One job's history and the yardsticks that stay."""

    base: Base
    task: ValidationTask
    root: Path
    points: list[ValidationPoint] = field(default_factory=list)
    real_ND: Tensor | None = None
    real_clip_ND: Tensor | None = None
    base_class_ND: Tensor | None = None
    ceiling_dino: float | None = None
    base_pres: float | None = None

    @property
    def _folder(self) -> Path:
        return self.root / self.task.job.job_id / "validation"

    @property
    def _train(self) -> TrainConfig:
        return self.task.job.train

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        patience = self._train.validation.patience
        best = self._best()
        return (
            patience is not None
            and best is not None
            and len(self.points) - 1 - self.points.index(best) >= patience
        )

    def resume(self, train_step: int) -> None:
        """The points up to this train step; later ones will be measured again."""
        history = self._folder / HISTORY
        if history.exists():
            found = json.loads(history.read_text(encoding="utf-8"))
            self.ceiling_dino, self.base_pres = found["ceiling_dino"], found["base_pres"]
            points = [ValidationPoint.model_validate(values) for values in found["points"]]
            self.points = [point for point in points if point.train_step <= train_step]

    def is_due(self, report: SlotReport) -> bool:
        """At every so many train steps, and at the last."""
        every = self._train.validation.every_steps
        on_time = every is not None and report.train_step % every == 0
        return report.status == "finished" or (report.status == "running" and on_time)

    def measure(self, pack: Pack) -> tuple[ValidationPoint, Images]:
        """The slot as it stands: appended to the history on disk, with its weights if best."""
        state = pack.state(self.task.job.job_id)
        tensors = self.task.held_out or self.task.job.tensors
        images: Images = []
        values: dict[str, float | bool | None] = {
            "loss": fixed_loss(self.base, pack, self.task.job, tensors)
        }
        if self._train.validation.samples:
            images = self._draw(pack, self.task.prompts, pack.slot(self.task.job.job_id))
            values |= self._judge(pack, images)
        point = ValidationPoint(train_step=state.train_step, **values)
        self.points.append(point)
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._train.validation.keep == "best" and self._best() == point:
            weights = {"flat_N": state.flat_N}
            write_whole(self._folder / _weights_name(state.train_step), save(weights))
        for place, image in enumerate(images):
            name = f"step-{state.train_step:08d}-{place:02d}.png"
            image.save(self._folder / name)
        history = {
            "ceiling_dino": self.ceiling_dino,
            "base_pres": self.base_pres,
            "points": [each.model_dump() for each in self.points],
        }
        write_whole(self._folder / HISTORY, json.dumps(history).encode())
        self._prune()
        return point, images

    def settle(self, pack: Pack) -> None:
        best = self._best()
        if self._train.validation.keep == "best" and best is not None:
            flat_N = load_file(self._folder / _weights_name(best.train_step))["flat_N"]
            pack.take_weights(self.task.job.job_id, flat_N)

    def record(self) -> ValidationRecord:
        best, config = self._best(), self._train.validation
        assert best is not None, "the last train step is always validated"
        held_out, last = self.task.held_out, self.points[-1].train_step
        encoders = {"image_encoder": self.task.image_encoder, "clip": self.task.clip}
        return ValidationRecord(
            loss_of="instance images" if held_out is None else "held-out photos",
            held_out=() if held_out is None else held_out.photo_digests,
            ceiling_dino=self.ceiling_dino,
            base_pres=self.base_pres,
            points=tuple(self.points),
            best_step=best.train_step,
            published_step=best.train_step if config.keep == "best" else last,
            stopped_early=last < self._train.num_train_steps,
            encoders={name: one.fingerprint for name, one in encoders.items() if one is not None},
        )

    def pictures(self) -> dict[str, Path]:
        return {f"validation-{path.name}": path for path in sorted(self._folder.glob("step-*.png"))}

    def _best(self) -> ValidationPoint | None:
        """The first of the best points; with `dino`, those that copy only when all do."""
        if not self.points:
            return None
        if self._train.validation.best_by == "loss":
            return min(self.points, key=lambda point: point.loss)
        return max(self.points, key=lambda point: (not point.copying, point.dino))

    def _judge(self, pack: Pack, images: Images) -> Mapping[str, float | bool | None]:
        values: dict[str, float | bool | None] = {}
        config, image, clip = self._train.validation, self.task.image_encoder, self.task.clip
        photos: Images = []
        if self.real_ND is None and self.real_clip_ND is None and (image or clip):
            photos = [load_photo(path) for path in self.task.photos]
        if image is not None:
            slot, prompts = (
                pack.slot(self.task.job.job_id),
                [self.task.class_prompt] * config.class_images,
            )
            if self.real_ND is None:
                self.real_ND = image.embed(photos)
                self.base_class_ND = image.embed(self._draw(pack, prompts, 0))
                self.ceiling_dino = mean_pairwise_cosine(self.real_ND)
                self.base_pres = mean_cosine(self.base_class_ND, self.real_ND)
            assert self.base_class_ND is not None
            class_ND = image.embed(self._draw(pack, prompts, slot))
            ceiling = self.ceiling_dino
            dino = mean_cosine(image.embed(images), self.real_ND)
            drift = float((1 - (class_ND * self.base_class_ND).sum(1)).mean())
            values |= {
                "dino": dino,
                "pres": mean_cosine(class_ND, self.real_ND),
                "drift": drift,
                "copying": ceiling is not None and dino > ceiling,
                "drifting": drift > config.max_drift,
            }
        if clip is not None:
            if self.real_clip_ND is None:
                self.real_clip_ND = clip.embed(photos)
            sample_ND = clip.embed(images)
            values["clip_i"] = mean_cosine(sample_ND, self.real_clip_ND)
            said_ND = clip.read(self.task.plain_prompts)
            values["clip_t"] = float((sample_ND * said_ND).sum(1).mean())
        return values

    def _draw(self, pack: Pack, prompts: Sequence[str], slot: int) -> list[Image.Image]:
        text = pack.text_adapter(self.task.job.job_id) if slot else None
        config, side = self._train.samples, self._train.resolution
        requests = [
            SampleRequest(
                prompt=prompt,
                seed=self.task.job.seed + place,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                solver=config.solver,
                height=side,
                width=side,
                slot=slot,
                zero_terminal_snr=self._train.objective.zero_terminal_snr and slot > 0,
                text=text,
            )
            for place, prompt in enumerate(prompts)
        ]
        return generate(self.base, pack.bank, requests)

    def _prune(self) -> None:
        """The newest best weights and a few before: a resumed training starts further back."""
        for path in sorted(self._folder.glob("weights-*.safetensors"))[:-KEPT_BESTS]:
            path.unlink()


def _weights_name(train_step: int) -> str:
    return f"weights-{train_step:08d}.safetensors"


def _part(tensors: SubjectTensors, samples: slice, photos: slice) -> SubjectTensors:
    mask_NHW = tensors.mask_NHW
    return replace(
        tensors,
        mean_NCHW=tensors.mean_NCHW[samples],
        std_NCHW=tensors.std_NCHW[samples],
        prompt_N=tensors.prompt_N[samples],
        size_N=tensors.size_N[samples],
        size_conditioning={k: rows[samples] for k, rows in tensors.size_conditioning.items()},
        mask_NHW=None if mask_NHW is None else mask_NHW[samples],
        photo_digests=tensors.photo_digests[photos],
    )
