"""The history of one validated subject: its points, its best weights, when patience runs out.

Every point is a function of (the weights, seed, subject), so a resumed training finds the same
points and the same best one. History and best weights lie beside the checkpoints; points after
the train step that a training goes on from are measured again.

N images or samples, D features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from raybooth.config import TrainConfig
from raybooth.data.encode import SubjectTensors
from raybooth.data.images import load_photo
from raybooth.data.whole_file import write_whole
from raybooth.encoders import ClipEncoder, ImageEncoder
from raybooth.evaluation import mean_cosine, mean_pairwise_cosine
from raybooth.model.sampler import SampleRequest
from raybooth.model.text_adapter import TextAdapter
from raybooth.training.job import SlotJob
from raybooth.validation_record import ValidationPoint, ValidationRecord

Images = Sequence[Image.Image]
HISTORY = "history.json"
KEPT_BESTS = 3


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


class Trained(Protocol):
    """A subject between two train steps; measuring it changes nothing of it."""

    @property
    def train_step(self) -> int:
        """Train steps done."""

    def loss(self, tensors: SubjectTensors) -> float:
        """Mean instance loss of every image at the fixed timesteps."""

    def draw(self, prompts: Sequence[str]) -> Images:
        """The subject's pictures, always from the same seeds."""

    def draw_base(self, prompts: Sequence[str]) -> Images:
        """The base's own pictures, from the same seeds."""

    def weights(self) -> Mapping[str, Tensor]:
        """All that is trained, on the CPU."""


@dataclass
class Watched:
    """One job's history and the yardsticks that stay."""

    task: ValidationTask
    root: Path
    """`root`/<job_id>/validation holds history, weights and pictures."""
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

    def is_due(self, train_step: int, *, is_last: bool) -> bool:
        """At every so many train steps, and at the last."""
        every = self._train.validation.every_steps
        return is_last or (every is not None and train_step % every == 0)

    def measure(self, trained: Trained) -> tuple[ValidationPoint, Images]:
        """The subject as it stands: appended to the history on disk, with its weights if best."""
        train_step = trained.train_step
        tensors = self.task.held_out or self.task.job.tensors
        images: Images = []
        values: dict[str, float | bool | None] = {"loss": trained.loss(tensors)}
        if self._train.validation.samples:
            images = trained.draw(self.task.prompts)
            values |= self._judge(trained, images)
        point = ValidationPoint(train_step=train_step, **values)
        self.points.append(point)
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._train.validation.keep == "best" and self._best() == point:
            write_whole(self._folder / _weights_name(train_step), save(dict(trained.weights())))
        for place, image in enumerate(images):
            image.save(self._folder / f"step-{train_step:08d}-{place:02d}.png")
        history = {
            "ceiling_dino": self.ceiling_dino,
            "base_pres": self.base_pres,
            "points": [each.model_dump() for each in self.points],
        }
        write_whole(self._folder / HISTORY, json.dumps(history).encode())
        self._prune()
        return point, images

    def best_weights(self) -> dict[str, Tensor] | None:
        """What is to be published in place of the last weights; None where those are kept."""
        best = self._best()
        if self._train.validation.keep == "last" or best is None:
            return None
        return load_file(self._folder / _weights_name(best.train_step))

    def record(self) -> ValidationRecord:
        """What goes into the published record."""
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
        """Each validation's samples, as files to publish, in order."""
        return {f"validation-{path.name}": path for path in sorted(self._folder.glob("step-*.png"))}

    def _best(self) -> ValidationPoint | None:
        """The first of the best points; with `dino`, those that copy only when all do."""
        if not self.points:
            return None
        if self._train.validation.best_by == "loss":
            return min(self.points, key=lambda point: point.loss)
        return max(self.points, key=lambda point: (not point.copying, point.dino))

    def _judge(self, trained: Trained, images: Images) -> Mapping[str, float | bool | None]:
        values: dict[str, float | bool | None] = {}
        config, image, clip = self._train.validation, self.task.image_encoder, self.task.clip
        photos: Images = []
        if self.real_ND is None and self.real_clip_ND is None and (image or clip):
            photos = [load_photo(path) for path in self.task.photos]
        if image is not None:
            prompts = [self.task.class_prompt] * config.class_images
            if self.real_ND is None:
                self.real_ND = image.embed(photos)
                self.base_class_ND = image.embed(trained.draw_base(prompts))
                self.ceiling_dino = mean_pairwise_cosine(self.real_ND)
                self.base_pres = mean_cosine(self.base_class_ND, self.real_ND)
            assert self.base_class_ND is not None
            class_ND = image.embed(trained.draw(prompts))
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

    def _prune(self) -> None:
        """The newest best weights and a few before: a resumed training starts further back."""
        for path in sorted(self._folder.glob("weights-*.safetensors"))[:-KEPT_BESTS]:
            path.unlink()


def _weights_name(train_step: int) -> str:
    return f"weights-{train_step:08d}.safetensors"


def sample_requests(
    job: SlotJob,
    prompts: Sequence[str],
    *,
    of_base: bool,
    slot: int = 0,
    text: TextAdapter | None = None,
) -> list[SampleRequest]:
    """A picture for each prompt, picture i from seed + i; the base keeps its own schedule."""
    config, side = job.train.samples, job.train.resolution
    return [
        SampleRequest(
            prompt=prompt,
            seed=job.seed + place,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            solver=config.solver,
            height=side,
            width=side,
            slot=slot,
            zero_terminal_snr=job.train.objective.zero_terminal_snr and not of_base,
            text=text,
        )
        for place, prompt in enumerate(prompts)
    ]
