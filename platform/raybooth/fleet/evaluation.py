"""One published subject's evaluation: drawn, scored and written down in one call (no ray)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raybooth.config import ResourcesConfig
from raybooth.data.images import load_photo, photo_digest
from raybooth.data.whole_file import write_whole
from raybooth.encoders import Encoders, encoder_fingerprint, load_encoders
from raybooth.errors import SubjectError
from raybooth.evaluation import Sampling, Scores, Words, draw, score
from raybooth.model.base import load_base
from raybooth.model.published import take_on, text_of
from raybooth.store import Record, Store

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class EvaluationTask:
    """What is drawn of one published subject, and who judges it."""

    store: Path
    record: Record
    photos: tuple[Path, ...]
    """Files among which the instance images are."""
    sampling: Sampling
    image_encoder: str
    clip: str
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """What its Ray task asks for, where it is one."""

    @property
    def report_name(self) -> str:
        """Of all that decides the scores; raises EncoderError for unknown encoders."""
        parts = [
            self.record.job_id,
            asdict(self.sampling),
            encoder_fingerprint(self.image_encoder, "embedder"),
            encoder_fingerprint(self.clip, "clip"),
        ]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return f"{self.record.subject_id}-{digest[:16]}.json"


def evaluate(
    task: EvaluationTask, device: str = "cpu", *, on_step: OnStep | None = None
) -> dict[str, Any]:
    """The subject's scores and all that they depend on; no file is written.

    Raises SubjectError without the instance images, BaseModelError, EncoderError.
    """
    record, sampling = task.record, task.sampling
    photos = find_photos(record, task.photos)
    judges = load_encoders(task.image_encoder, task.clip, device)
    base = load_base(record.base.name, revision=record.base.revision, device=device)
    folder = Store(task.store).folder(record.reference)
    text, bank = text_of(base, record, folder), take_on(base, record, folder)
    words = Words(record.identifier, record.class_noun)
    samples = draw(base, bank, 0 if bank is None else 1, words, sampling, text, on_step)
    plain = [words.plain(template) for template in sampling.prompts]
    scores = score(judges, [load_photo(path) for path in photos], samples, plain)
    return _described(record, scores, sampling, judges)


def evaluate_and_keep(
    task: EvaluationTask, folder: Path, device: str = "cpu", *, on_step: OnStep | None = None
) -> None:
    """`evaluate`, its report in `folder`: there whole or not there, whenever this is killed."""
    document = evaluate(task, device, on_step=on_step)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / task.report_name, json.dumps(document, indent=2).encode())


def find_photos(record: Record, paths: Sequence[Path]) -> list[Path]:
    """The instance images that the record names, each found among `paths` by its bytes.

    Raises SubjectError when one is not there or another picture by now.
    """
    by_digest = {photo_digest(path): path for path in paths if path.is_file()}
    missing = [photo.name for photo in record.photos if photo.sha256 not in by_digest]
    if missing or not record.photos:
        found = f"not found: {', '.join(missing)}" if missing else "the record names none"
        do = "name the folder that holds them with --photos"
        raise SubjectError(f"the photos of {record.reference} are needed", found, do)
    return [by_digest[photo.sha256] for photo in record.photos]


def _described(
    record: Record, scores: Scores, sampling: Sampling, judges: Encoders
) -> dict[str, Any]:
    return {
        "subject": record.reference,
        **scores.as_dict(),
        "num_instance_images": len(record.photos),
        "prompts": list(sampling.prompts),
        "images_per_prompt": sampling.images_per_prompt,
        "class_images": sampling.class_images,
        "seed": sampling.seed,
        "encoders": {
            "image": {"source": judges.image.source, "sha256": judges.image.fingerprint},
            "clip": {"source": judges.clip.source, "sha256": judges.clip.fingerprint},
        },
    }
