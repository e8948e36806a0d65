"""Subjects and fleets as frozen data: who, which photos, which words, how they are trained."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raybooth.config import (
    FleetConfig,
    Model,
    SubjectConfig,
    TrackingConfig,
    TrainConfig,
    find_config,
    load_yaml,
    merge,
    parse_config,
    problems_of,
)
from raybooth.config.adapter import learned_identifier
from raybooth.errors import InputError, InputProblems, SubjectError
from raybooth.sidecar import caption_file, is_mask, mask_file, read_caption

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_NOT_THE_RESULT = {"pack", "resources", "checkpoint", "gradient_checkpointing"}
SIDECAR_SUFFIXES = (".txt", ".md", ".json")


@dataclass(frozen=True, slots=True)
class Subject:
    """Who or what is learned (Ruiz et al. 2023, DreamBooth): words, photos, way of training."""

    subject_id: str
    class_noun: str
    identifier: str
    images: tuple[Path, ...]
    """The instance images, in sorted order."""
    train: TrainConfig
    """Resolved: overrides, prompts and seed of the subject are in it."""

    @property
    def seed(self) -> int:
        return self.train.seed

    @property
    def instance_prompt(self) -> str:
        return self._fill(self.train.instance_prompt)

    @property
    def class_prompt(self) -> str:
        return self._fill(self.train.class_prompt)

    @property
    def sample_prompts(self) -> tuple[str, ...]:
        return tuple(self._fill(prompt) for prompt in self.train.samples.prompts)

    def caption(self, image: Path) -> str:
        """The words of one photo: its own caption's, or the instance prompt.

        Raises SubjectError when there is a caption that cannot be used.
        """
        template = read_caption(image) if self.train.photos.captions else None
        return self.instance_prompt if template is None else self._fill(template)

    def sidecar_digests(self) -> tuple[str, ...]:
        """sha256 of each photo's caption, then of each one's mask; "" where none is read."""
        photos = self.train.photos
        files = [caption_file(image) for image in self.images] if photos.captions else []
        files += [mask_file(image) for image in self.images] if photos.masks else []
        return tuple(photo_digest(file) if file.exists() else "" for file in files)

    def _fill(self, template: str) -> str:
        return template.format(identifier=self.identifier, class_noun=self.class_noun)

    def digest(self, base_fingerprint: str) -> str:
        """sha256 of all that decides the result: photos and what lies beside them, words, config,
        base; names a job.

        How the work is spread (packs, resources, memory, checkpoint rhythm) is not part of it.
        """
        config = self.train.model_dump(mode="json", exclude=_NOT_THE_RESULT)
        parts = {
            "base": base_fingerprint,
            "subject": self.subject_id,
            "class_noun": self.class_noun,
            "identifier": self.identifier,
            "photos": [photo_digest(path) for path in self.images],
            "sidecars": self.sidecar_digests(),
            "train": config,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Fleet:
    """Subjects that are trained on one base."""

    source: Path
    base: str
    revision: str | None
    tracking: TrackingConfig
    subjects: tuple[Subject, ...]


def load_fleet(path: Path) -> Fleet:
    """The fleet file at `path`, every subject resolved.

    Raises InputProblems that lists everything wrong with the file at once; the photos'
    contents are checked by `raybooth.data.images.check_photos`, not here.
    """
    fleet, problems = read_fleet(path)
    if problems or fleet is None:
        raise InputProblems(str(path), problems)
    return fleet


def read_fleet(path: Path) -> tuple[Fleet | None, list[InputError]]:
    """All that can be made of the fleet file at `path`, and everything wrong with it.

    For those who list the problems of file and photos together; a fleet with problems must not
    be trained. None when so much is wrong that no subject can be told.
    """
    source = str(path)
    values = load_yaml(path)
    config, problems = _parse_partly(FleetConfig, values, source, _without_wrong_subjects)
    if config is None:
        return None, problems
    counts = Counter(subject.id for subject in config.subjects)
    for subject_id, count in counts.items():
        if count > 1:
            what, do = f"subject id {subject_id!r} is not unique", "give each subject its own"
            problems.append(SubjectError(what, f"{count}", do))
    train = _train_values(config.train, path, problems)
    if train is None:
        return None, problems
    folder = path.absolute().parent
    subjects = []
    for subject in config.subjects:
        resolved = _resolve(subject, config, train, folder, problems)
        if resolved is not None:
            subjects.append(resolved)
    base = config.base
    if (folder / base).is_dir() and base != "pocket":
        base = str(folder / base)
    tracking = config.tracking
    if tracking.folder is not None:
        tracking = tracking.model_copy(update={"folder": folder / tracking.folder})
    return Fleet(path.absolute(), base, config.revision, tracking, tuple(subjects)), problems


def photo_digest(path: Path) -> str:
    """sha256 of the file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _train_values(
    train: str | dict[str, Any], fleet: Path, problems: list[InputError]
) -> dict[str, Any] | None:
    """The train config's values as written, without what is wrong; None when it is unusable."""
    source, values = "train", train
    if isinstance(train, str):
        try:
            file = find_config("train", train, fleet.absolute().parent)
            source, values = str(file), load_yaml(file) or {}
        except InputError as error:
            problems.append(error)
            return None
    config, wrong = _parse_partly(TrainConfig, values, source, _without_wrong_keys)
    problems.extend(wrong)
    return None if config is None else config.model_dump(exclude_unset=True)


def _parse_partly(
    kind: type[Model], values: Any, source: str, prune: Callable[[Any, ValidationError], Any]
) -> tuple[Model | None, list[InputError]]:
    """`values` as a `kind`, or what is left of them when `prune` has taken out what is wrong."""
    try:
        return parse_config(kind, values, source), []
    except InputProblems as error:
        problems = list(error.problems)
        if not isinstance(error.__cause__, ValidationError):
            return None, problems
        pruned = prune(copy.deepcopy(values), error.__cause__)
    try:
        return (None if pruned is None else kind.model_validate(pruned)), problems
    except ValidationError:
        return None, problems


def _without_wrong_subjects(values: Any, error: ValidationError) -> Any:
    """A fleet without its unknown keys and wrong subjects; None when other things are wrong."""
    wrong: set[int] = set()
    for item in error.errors(include_url=False):
        where = item["loc"]
        if item["type"] == "extra_forbidden":
            _drop(values, where)
        elif len(where) > 1 and where[0] == "subjects" and isinstance(where[1], int):
            wrong.add(where[1])
        else:
            return None
    values["subjects"] = [s for i, s in enumerate(values["subjects"]) if i not in wrong]
    return values


def _without_wrong_keys(values: Any, error: ValidationError) -> Any:
    """A train config without its unknown or wrong keys; None when photos cannot be judged by it."""
    for item in error.errors(include_url=False):
        where = item["loc"]
        if where in ((), ("resolution",), ("min_images",)):
            return None
        _drop(values, where)
    return values


def _drop(values: Any, where: tuple[int | str, ...]) -> None:
    """Takes the key at `where` out, or the deepest key above it that is there."""
    holder, key = None, ""
    for part in where:
        inside = values[part] if isinstance(values, list) and isinstance(part, int) else None
        if isinstance(values, dict):
            if part not in values:
                break
            holder, key, inside = values, str(part), values[part]
        values = inside
    if holder is not None:
        holder.pop(key)


def _resolve(
    subject: SubjectConfig,
    fleet: FleetConfig,
    train: dict[str, Any],
    folder: Path,
    problems: list[InputError],
) -> Subject | None:
    defaults = fleet.defaults
    class_noun = subject.class_noun or defaults.class_noun
    if class_noun is None:
        do = "add class_noun, a coarse word such as dog"
        problems.append(SubjectError(f"subject {subject.id!r} has no class_noun", "", do))
    before = len(problems)
    images = _photos(subject, folder, problems)
    is_lost = not images and len(problems) > before
    values = merge(merge(train, defaults.overrides), subject.overrides)
    for prompts in (defaults.prompts, subject.prompts):
        if prompts.instance is not None:
            values = merge(values, {"instance_prompt": prompts.instance})
        if prompts.prior is not None:
            values = merge(values, {"class_prompt": prompts.prior})
        if prompts.samples is not None:
            values = merge(values, {"samples": {"prompts": prompts.samples}})
    seed = subject.seed if subject.seed is not None else defaults.seed
    if seed is not None:
        values = merge(values, {"seed": seed})
    config: TrainConfig | None = None
    try:
        config = TrainConfig.model_validate(values)
    except ValidationError as error:
        problems.extend(problems_of(error, f"subject {subject.id!r}: "))
    if is_lost or class_noun is None or config is None:
        return None
    identifier = subject.identifier or defaults.identifier
    if config.adapter.identifier_tokens:
        identifier = learned_identifier(subject.id)
        if subject.identifier not in (None, identifier):
            what = f"subject {subject.id!r}: identifier has no effect with identifier_tokens"
            problems.append(SubjectError(what, f"{subject.identifier}", f"it is {identifier}"))
    return Subject(subject.id, class_noun, identifier, images, config)


def _photos(subject: SubjectConfig, folder: Path, problems: list[InputError]) -> tuple[Path, ...]:
    listed = [subject.images] if isinstance(subject.images, str) else list(subject.images)
    found: list[Path] = []
    for name in listed:
        path = folder / name
        if path.is_dir() and isinstance(subject.images, str):
            found.extend(entry for entry in path.iterdir() if _is_photo(entry))
        elif path.is_file():
            found.append(path)
        else:
            do = "paths are relative to the fleet file"
            what = f"subject {subject.id!r}: no photo or folder {name}"
            problems.append(SubjectError(what, str(path), do))
    for path in found:
        if path.suffix.lower() not in PHOTO_SUFFIXES:
            what = f"subject {subject.id!r}: {path.name} is not a photo format that is read"
            problems.append(SubjectError(what, path.suffix or "no suffix", "use JPEG, PNG or WebP"))
    return tuple(sorted(path for path in found if path.suffix.lower() in PHOTO_SUFFIXES))


def _is_photo(entry: Path) -> bool:
    hidden = entry.name.startswith(".")
    beside = entry.suffix.lower() in SIDECAR_SUFFIXES or is_mask(entry)
    return entry.is_file() and not hidden and not beside
