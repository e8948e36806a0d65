"""Immutable published models, the only thing that training and serving share at run time.

`<root>/<subject_id>/<version>/` holds the weights, `samples.png` and `record.json`. A version
appears by one rename, whole, and is never changed; `aliases.json` beside the versions points
names at them. Standard library and pydantic only.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from uuid import uuid4

from pydantic import Field, TypeAdapter, ValidationError

from raybooth.config import Strict
from raybooth.errors import InputError, NotPublishedError, StoreError
from raybooth.validation_record import ValidationRecord

SCHEMA_VERSION = 1
WEIGHTS = "pytorch_lora_weights.safetensors"
LEARNED = "learned_embeds.safetensors"
"""Token embeddings that a subject learned, where it did; diffusers' own name."""

SAMPLES = "samples.png"
RECORD = "record.json"
ALIASES = "aliases.json"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class FileRecord(Strict):
    """One file of a published version."""

    sha256: str
    size_bytes: int


class BaseRecord(Strict):
    """The base that an adapter was trained on."""

    name: str
    fingerprint: str
    revision: str | None = None


class PhotoRecord(Strict):
    """One instance image, by content."""

    name: str
    sha256: str


class PriorRecord(Strict):
    """The prior images that took part."""

    key: str
    num_images: int
    sha256: str
    """Of the image digests, in order."""


KeyForm = Literal["diffusers", "peft", "kohya"]
"""How an adapter's file calls its layers."""


class ImportRecord(Strict):
    """The file of an adapter that was trained elsewhere."""

    file: str
    sha256: str
    key_form: KeyForm


class ModelRecord(Strict):
    """What `record.json` says of every published model."""

    schema_version: Literal[1] = 1
    subject_id: str
    version: int = 0
    """Given by the store at publication."""

    created: str = ""
    """UTC, ISO 8601; given by the store at publication."""

    job_id: str
    class_noun: str
    identifier: str
    instance_prompt: str
    class_prompt: str
    base: BaseRecord
    num_parameters: int
    train: dict[str, Any]
    """The train config as resolved; empty where a model was imported."""

    photos: tuple[PhotoRecord, ...]
    prior: PriorRecord | None
    loss_curve: tuple[tuple[int, float], ...]
    """(train step, loss), thinned."""

    num_train_steps: int | None
    """None where a model was imported: nobody here counted them."""

    validation: ValidationRecord | None = None
    """What was measured between train steps; None where nothing was."""

    seconds: dict[str, float]
    versions: dict[str, str]
    files: dict[str, FileRecord] = Field(default_factory=dict)
    """Given by the store at publication."""

    @property
    def reference(self) -> str:
        """`subject@version`."""
        return f"{self.subject_id}@{self.version}"

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether it was trained, and must be sampled, on the base's schedule rescaled so."""
        return bool(self.train.get("objective", {}).get("zero_terminal_snr", False))


class AdapterRecord(ModelRecord):
    """`record.json`: everything needed to know, serve and reproduce a published adapter."""

    kind: Literal["adapter"] = "adapter"
    rank: int
    targets: str | tuple[str, ...]
    text_targets: str | tuple[str, ...] | None = None
    """Sites in the text encoders; None where it leaves them as they are."""

    identifier_tokens: int = 0
    """Learned tokens that `identifier` names, in LEARNED; 0 where it is a word of the base."""

    imported: ImportRecord | None = None
    """Where the adapter came from; None when RayBooth trained it."""


class FullRecord(ModelRecord):
    """`record.json` of a full fine-tune: every weight of some parts of the base, in float32."""

    kind: Literal["full"] = "full"
    parts: tuple[str, ...]
    """Folders of the base whose weights were trained; each is a file `<part>.safetensors`."""


Record = AdapterRecord | FullRecord
AnyRecord = TypeVar("AnyRecord", bound=ModelRecord)


class Store:
    """Published models under one folder; every reader sees whole versions or nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def publish(self, record: AnyRecord, files: Mapping[str, Path]) -> AnyRecord:
        """A new version of `record.subject_id` with copies of `files`, in one atomic rename.

        Returns the record as written (version, time and checksums filled in). Raises StoreError,
        leaving nothing behind, when the files cannot be written.
        """
        check_subject_id(record.subject_id)
        folder = self.root / record.subject_id
        staging = folder / f".staging-{uuid4().hex}"
        try:
            staging.mkdir(parents=True)
            for name, path in files.items():
                shutil.copyfile(path, staging / name)
            described = {name: describe_file(staging / name) for name in files}
            while True:
                version = max(self._numbers(record.subject_id), default=0) + 1
                created = datetime.now(UTC).isoformat(timespec="seconds")
                final = record.model_copy(
                    update={"version": version, "created": created, "files": described}
                )
                (staging / RECORD).write_text(final.model_dump_json(indent=2) + "\n", "utf-8")
                _sync(staging)
                try:
                    staging.rename(folder / str(version))
                except OSError:
                    if (folder / str(version)).exists():
                        continue  # another process took this number
                    raise
                _sync_folder(folder)
                return final
        except OSError as error:
            raise StoreError(
                f"{record.subject_id!r} could not be published",
                error.strerror or str(error),
                f"make room or permission under {self.root} and run again",
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def subjects(self) -> list[str]:
        """Ids with at least one published version, sorted."""
        if not self.root.is_dir():
            return []
        names = (entry.name for entry in self.root.iterdir() if entry.is_dir())
        return sorted(name for name in names if _NAME.fullmatch(name) and self._numbers(name))

    def versions(self, subject_id: str) -> list[int]:
        """Published versions of a subject, oldest first; raises NotPublishedError if none."""
        numbers = sorted(self._numbers(subject_id)) if _NAME.fullmatch(subject_id) else []
        if not numbers:
            raise self._unknown(subject_id)
        return numbers

    def records(self) -> Iterator[Record]:
        """Every published version's record, by subject and version."""
        for subject_id in self.subjects():
            for version in self.versions(subject_id):
                yield self.fetch(f"{subject_id}@{version}")

    def resolve(self, reference: str) -> tuple[str, int]:
        """(subject, version) of `subject`, `subject@3`, `subject@latest` or `subject@<alias>`.

        Raises NotPublishedError, listing near names.
        """
        subject_id, _, label = reference.partition("@")
        numbers = self.versions(subject_id)
        label = label or "latest"
        if label.isdecimal():
            if int(label) in numbers:
                return subject_id, int(label)
        else:
            aliases = self.aliases(subject_id)
            if label in aliases:
                return subject_id, aliases[label]
        known = ", ".join([*map(str, numbers), *self.aliases(subject_id)])
        raise NotPublishedError(f"{subject_id!r} has no version {label!r}", f"versions {known}")

    def folder(self, reference: str) -> Path:
        """The folder of a published version."""
        subject_id, version = self.resolve(reference)
        return self.root / subject_id / str(version)

    def fetch(self, reference: str) -> Record:
        """The record of a published version.

        Raises NotPublishedError, or StoreError when the record is damaged or of a schema
        that this version does not know.
        """
        path = self.folder(reference) / RECORD
        try:
            values = json.loads(path.read_text("utf-8"))
            schema = values.get("schema_version")
            if schema != SCHEMA_VERSION:
                raise StoreError(
                    f"{path} has another schema",
                    f"schema_version {schema!r}, this RayBooth knows {SCHEMA_VERSION}",
                    "use the RayBooth that wrote it, or publish the subject again",
                )
            return _RECORDS.validate_python(values)
        except (OSError, ValueError, AttributeError, ValidationError) as error:
            found = " ".join(str(error).split())[:200]
            raise StoreError(
                f"{path} is not readable", found, "publish the subject again"
            ) from error

    def verify(self, reference: str) -> list[str]:
        """What is wrong with the files of a version: missing or changed ones; empty when whole."""
        folder, record = self.folder(reference), self.fetch(reference)
        wrong = []
        for name, expected in record.files.items():
            if not (folder / name).is_file():
                wrong.append(f"{name} is missing")
            elif describe_file(folder / name) != expected:
                wrong.append(f"{name} differs from its checksum")
        return wrong

    def delete(self, reference: str) -> list[str]:
        """Remove one version (`subject@3`) or a whole subject (`subject`); returns what went.

        Aliases of a removed version go with it.
        """
        subject_id, _, label = reference.partition("@")
        if label:
            subject_id, version = self.resolve(reference)
            gone = [version]
        else:
            gone = self.versions(subject_id)
        kept = {k: v for k, v in self._own_aliases(subject_id).items() if v not in gone}
        self._write_aliases(subject_id, kept)
        for version in gone:
            grave = self.root / subject_id / f".deleted-{uuid4().hex}"
            (self.root / subject_id / str(version)).rename(grave)
            shutil.rmtree(grave)
        if not self._numbers(subject_id):
            shutil.rmtree(self.root / subject_id)
        return [f"{subject_id}@{version}" for version in gone]

    def aliases(self, subject_id: str) -> dict[str, int]:
        """Alias to version; `latest` is the newest version unless it was set by hand."""
        return {"latest": self.versions(subject_id)[-1], **self._own_aliases(subject_id)}

    def set_alias(self, subject_id: str, alias: str, version: int | None) -> None:
        """Point `alias` at `version` (None removes it), in one atomic rename."""
        if not _NAME.fullmatch(alias) or alias.isdecimal():
            do = "use lower-case letters, digits and hyphens, not a number"
            raise InputError("this alias cannot be used", repr(alias), do)
        own = self._own_aliases(subject_id)
        own.pop(alias, None)
        if version is not None:
            own[alias] = self.resolve(f"{subject_id}@{version}")[1]
        self._write_aliases(subject_id, own)

    def published_job(self, subject_id: str, job_id: str) -> Record | None:
        """The newest version that `job_id` published, or none."""
        if not _NAME.fullmatch(subject_id):
            return None
        for version in sorted(self._numbers(subject_id), reverse=True):
            record = self.fetch(f"{subject_id}@{version}")
            if record.job_id == job_id:
                return record
        return None

    def _numbers(self, subject_id: str) -> list[int]:
        folder = self.root / subject_id
        if not folder.is_dir():
            return []
        return [int(e.name) for e in folder.iterdir() if e.name.isdecimal() and e.is_dir()]

    def _own_aliases(self, subject_id: str) -> dict[str, int]:
        path = self.root / subject_id / ALIASES
        try:
            return {str(k): int(v) for k, v in json.loads(path.read_text("utf-8")).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            do = "delete it to fall back to the versions alone"
            raise StoreError(f"{path} is not readable", str(error), do) from error

    def _write_aliases(self, subject_id: str, aliases: dict[str, int]) -> None:
        folder = self.root / subject_id
        if not aliases:
            (folder / ALIASES).unlink(missing_ok=True)
            return
        staging = folder / f".aliases-{uuid4().hex}"
        staging.write_text(json.dumps(aliases, indent=2, sort_keys=True) + "\n", "utf-8")
        _sync_file(staging)
        staging.replace(folder / ALIASES)
        _sync_folder(folder)

    def _unknown(self, subject_id: str) -> NotPublishedError:
        near = difflib.get_close_matches(subject_id, self.subjects(), n=5, cutoff=0.5)
        do = f"did you mean {', '.join(near)}?" if near else "see `raybooth models`"
        return NotPublishedError(f"no subject {subject_id!r} is published", "", do)


_RECORDS: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def describe_file(path: Path) -> FileRecord:
    """Checksum and size of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileRecord(sha256=digest.hexdigest(), size_bytes=path.stat().st_size)


def check_subject_id(subject_id: str) -> None:
    """InputError unless the id can be a folder and a DNS label."""
    if not _NAME.fullmatch(subject_id):
        do = "use lower-case letters, digits and inner hyphens, at most 63"
        raise InputError("this subject id cannot be used", repr(subject_id), do)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        _sync_file(path)
    _sync_folder(folder)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
