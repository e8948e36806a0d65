"""Immutable published models, the only thing that training and serving share at run time.

`<root>/<subject_id>/<version>/` holds the weights, `samples.png` and `record.json`. A version
appears by one rename, whole, and is never changed; `aliases.json` beside the versions points
names at them, `preview.json` at the newest checkpoint of a job that still runs. Standard library
and pydantic only.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from uuid import uuid4

from raybooth.aliases import ALIASES as ALIASES
from raybooth.aliases import LATEST, Aliases, AliasMove
from raybooth.aliases import PRODUCTION as PRODUCTION
from raybooth.atomic import locked, sync_files, sync_folder
from raybooth.errors import InputError, NotPublishedError, StoreError
from raybooth.near import near_names
from raybooth.previews import (
    PREVIEW,
    has_preview,
    is_preview,
    newest_preview,
    preview_label,
    remove_preview,
    replace_preview,
)
from raybooth.records import LEARNED as LEARNED
from raybooth.records import RECORD as RECORD
from raybooth.records import SAMPLES as SAMPLES
from raybooth.records import WEIGHTS as WEIGHTS
from raybooth.records import AdapterRecord as AdapterRecord
from raybooth.records import AnyRecord, FileRecord, read_record
from raybooth.records import BaseRecord as BaseRecord
from raybooth.records import ExtractRecord as ExtractRecord
from raybooth.records import FullRecord as FullRecord
from raybooth.records import ImportRecord as ImportRecord
from raybooth.records import KeyForm as KeyForm
from raybooth.records import ModelRecord as ModelRecord
from raybooth.records import OutputLoss as OutputLoss
from raybooth.records import PhotoRecord as PhotoRecord
from raybooth.records import PriorRecord as PriorRecord
from raybooth.records import Record as Record
from raybooth.records import describe_file as describe_file

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Store:
    """Published models under one folder; every reader sees whole versions or nothing."""

    def __init__(self, root: Path, seen: Sequence[str] = ("*",)) -> None:
        """A reader may be given globs of subject ids in `seen`; to it no others are there."""
        self.root = root
        self.seen = tuple(seen)

    def publish(self, record: AnyRecord, files: Mapping[str, Path]) -> AnyRecord:
        """A new version of `record.subject_id` with copies of `files`, in one atomic rename.

        Returns the record as written (version, time and checksums filled in). Raises StoreError,
        leaving nothing behind, when the files cannot be written.
        """
        folder = self.root / record.subject_id
        with self._staged(record.subject_id, files, "published") as (staging, described):
            while True:
                version = max(self._numbers(record.subject_id), default=0) + 1
                changes = {"version": version, "preview": None, "files": described}
                final = _write_record(staging, record, changes)
                try:
                    staging.rename(folder / str(version))
                except OSError:
                    if (folder / str(version)).exists():
                        continue  # another process took this number
                    raise
                sync_folder(folder)
                return final

    def publish_preview(self, record: AdapterRecord, files: Mapping[str, Path]) -> AdapterRecord:
        """The subject's preview: what a job that still runs has after `record.num_train_steps`.

        It takes the place of the one before whole; the rest as `publish`.
        """
        folder = self.root / record.subject_id
        with self._staged(record.subject_id, files, "written as a preview") as staged:
            staging, described = staged
            label = preview_label(record.num_train_steps or 0, record.job_id, described)
            changes = {"version": 0, "preview": label, "files": described}
            final = _write_record(staging, record, changes)
            with self._changing(record.subject_id):
                replace_preview(folder, staging, label, record.job_id)
            return final

    def drop_preview(self, subject_id: str, job_id: str | None = None) -> str | None:
        """Take the subject's preview away (only if it is of `job_id`, where given); what went.

        One whose pointer is damaged goes in any case.
        """
        folder = self.root / subject_id
        if not _NAME.fullmatch(subject_id) or not has_preview(folder):
            return None
        with self._changing(subject_id):
            try:
                pointer = newest_preview(folder)
            except StoreError:  # it names nothing any more, and no other's next is hindered
                remove_preview(folder)
                return f"{subject_id}@{PREVIEW}"
            if pointer is None or job_id not in (None, pointer.job_id):
                return None
            remove_preview(folder)
            return f"{subject_id}@{pointer.label}"

    def subjects(self) -> list[str]:
        """Ids with at least one published version, sorted."""
        return [name for name in self._names() if self._numbers(name)]

    def versions(self, subject_id: str) -> list[int]:
        """Published versions of a subject, oldest first; raises NotPublishedError if none."""
        numbers = sorted(self._numbers(subject_id)) if _NAME.fullmatch(subject_id) else []
        if not numbers:
            raise self._unknown(subject_id)
        return numbers

    def stamps(self) -> dict[str, tuple[int, int]]:
        """By subject id, what the file system says of its folder: changes with all that is in it.

        (inode, nanoseconds of its last change), without a look inside; raises OSError.
        """
        found = {}
        with os.scandir(self.root) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # deleted while this looks
                    if self._may_be(entry):
                        status = entry.stat()
                        found[entry.name] = status.st_ino, status.st_mtime_ns
        return dict(sorted(found.items()))

    def records(self) -> Iterator[Record]:
        """Every published version's record, by subject and version."""
        for subject_id in self.subjects():
            for version in self.versions(subject_id):
                yield self.fetch(f"{subject_id}@{version}")

    def previewed(self) -> list[str]:
        """Ids with a preview, sorted; some of them may have no published version."""
        return [name for name in self._names() if has_preview(self.root / name)]

    def resolve(self, reference: str) -> tuple[str, int]:
        """(subject, version) of `subject`, `subject@3`, `subject@latest` or `subject@<alias>`.

        Plain `subject` is `subject@latest`. Raises NotPublishedError, listing near names; a
        preview is no version.
        """
        subject_id, _, label = reference.partition("@")
        numbers = self.versions(subject_id)
        label = label or LATEST
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
        """The folder of a published version or a preview."""
        subject_id, _, label = reference.partition("@")
        if is_preview(label):
            return self._home(subject_id) / self._preview_label(subject_id, label)
        subject_id, version = self.resolve(reference)
        return self._home(subject_id) / str(version)

    def fetch(self, reference: str) -> Record:
        """The record of a published version, or of a preview (`subject@preview`).

        Raises NotPublishedError, or StoreError when the record is damaged or of a schema
        that this version does not know.
        """
        return read_record(self.folder(reference) / RECORD)

    def verify(self, reference: str) -> list[str]:
        """What is wrong with the files of a version: missing or changed ones; empty when whole."""
        record = self.fetch(reference)
        folder = self.folder(record.reference)
        wrong = []
        for name, expected in record.files.items():
            if not (folder / name).is_file():
                wrong.append(f"{name} is missing")
            elif describe_file(folder / name) != expected:
                wrong.append(f"{name} differs from its checksum")
        return wrong

    def delete(self, reference: str, *, with_aliases: bool = False) -> list[str]:
        """Remove one version (`subject@3`) or all of a subject (`subject`); returns what went.

        Raises InputError for one version that aliases point at, unless they are to go with it.
        """
        subject_id, _, label = reference.partition("@")
        if is_preview(label):
            self._preview_label(subject_id, label)
            gone = self.drop_preview(subject_id)
            return [] if gone is None else [gone]
        with self._changing(subject_id, exists=True):
            versions = [self.resolve(reference)[1]] if label else self.versions(subject_id)
            aliases = self._aliases(subject_id)
            named = [name for name, at in aliases.current().items() if at in versions]
            if label and named and not with_aliases:
                found = f"{', '.join(named)} of {subject_id}"
                do = "point the alias at another version first, or delete it along (--with-aliases)"
                raise InputError(f"an alias points at {subject_id}@{versions[0]}", found, do)
            aliases.forget(versions)
            for version in versions:
                grave = self.root / subject_id / f".deleted-{uuid4().hex}"
                (self.root / subject_id / str(version)).rename(grave)
                shutil.rmtree(grave)
            went = [f"{subject_id}@{version}" for version in versions]
            if not label and (pointer := newest_preview(self.root / subject_id)) is not None:
                went.append(f"{subject_id}@{pointer.label}")
            elif self._numbers(subject_id) or has_preview(self.root / subject_id):
                return went
            shutil.rmtree(self.root / subject_id)
            return went

    def aliases(self, subject_id: str) -> dict[str, int]:
        """Alias to version; `latest` is the newest version unless it was set by hand."""
        return {LATEST: self.versions(subject_id)[-1], **self._aliases(subject_id).current()}

    def alias_history(self, subject_id: str) -> Mapping[str, tuple[AliasMove, ...]]:
        """Every alias that was ever set, with its moves, oldest first."""
        self.versions(subject_id)
        return self._aliases(subject_id).history()

    def set_alias(self, subject_id: str, alias: str, version: int | None) -> None:
        """Point `alias` at `version` (None removes it), in one atomic rename."""
        if not _NAME.fullmatch(alias) or alias.isdecimal() or alias.startswith(PREVIEW):
            do = f"use lower-case letters, digits and hyphens, not a number nor {PREVIEW!r}"
            raise InputError("this alias cannot be used", repr(alias), do)
        with self._changing(subject_id, exists=True):
            if version is not None:
                self.resolve(f"{subject_id}@{version}")
            self._aliases(subject_id).point(alias, version)

    def promote(self, reference: str, alias: str = PRODUCTION) -> tuple[int | None, int]:
        """Point `alias` at a version whose files are whole; returns (version before, version now).

        Raises StoreError, changing nothing, when they are not.
        """
        subject_id, _, label = reference.partition("@")
        if is_preview(label):
            do = "let its job publish, then promote the version"
            raise InputError("a preview cannot be promoted", reference, do)
        version = self.resolve(reference)[1]
        self._check_whole(subject_id, version)
        before = self.aliases(subject_id).get(alias)
        self.set_alias(subject_id, alias, version)
        return before, version

    def roll_back(self, subject_id: str, alias: str = PRODUCTION) -> tuple[int | None, int]:
        """Point `alias` at what it pointed at before; returns as `promote`.

        Raises InputError where nothing was before, StoreError where that is damaged by now.
        """
        with self._changing(subject_id, exists=True):
            before, aliases = self.aliases(subject_id).get(alias), self._aliases(subject_id)
            version = aliases.before(alias)
            if version is not None:
                self._check_whole(subject_id, version)
            aliases.roll_back(alias)
            return before, self.aliases(subject_id)[alias]

    def published_job(self, subject_id: str, job_id: str) -> Record | None:
        """The newest version that `job_id` published, or none."""
        if not _NAME.fullmatch(subject_id):
            return None
        for version in sorted(self._numbers(subject_id), reverse=True):
            record = self.fetch(f"{subject_id}@{version}")
            if record.job_id == job_id:
                return record
        return None

    @contextmanager
    def _staged(
        self, subject_id: str, files: Mapping[str, Path], to_be: str
    ) -> Iterator[tuple[Path, dict[str, FileRecord]]]:
        """A folder beside the versions with copies of `files`, and what they are."""
        check_subject_id(subject_id)
        staging = self.root / subject_id / f".staging-{uuid4().hex}"
        try:
            staging.mkdir(parents=True)
            for name, path in files.items():
                shutil.copyfile(path, staging / name)
            yield staging, {name: describe_file(staging / name) for name in files}
        except OSError as error:
            raise StoreError(
                f"{subject_id!r} could not be {to_be}",
                error.strerror or str(error),
                f"make room or permission under {self.root} and run again",
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @contextmanager
    def _changing(self, subject_id: str, *, exists: bool = False) -> Iterator[None]:
        """The subject's lock, beside its folder; with `exists`, of a published one only."""
        if exists:
            self.versions(subject_id)
        try:
            with locked(self.root / f".{subject_id}.lock"):
                yield
        except OSError as error:
            found = error.strerror or str(error)
            do = f"make room or permission under {self.root} and run again"
            raise StoreError(f"{subject_id!r} could not be changed", found, do) from error

    def _check_whole(self, subject_id: str, version: int) -> None:
        reference = f"{subject_id}@{version}"
        if wrong := self.verify(reference):
            do = "point the alias at a version that is whole"
            raise StoreError(f"{reference} is damaged", "; ".join(wrong), do)

    def _preview_label(self, subject_id: str, label: str) -> str:
        """The preview's own label; NotPublishedError when it is not there (any more)."""
        if not _NAME.fullmatch(subject_id):
            raise self._unknown(subject_id)
        if label == PREVIEW:
            pointer = newest_preview(self._home(subject_id))
            if pointer is None and not self._numbers(subject_id):
                raise self._unknown(subject_id)
            label = pointer.label if pointer is not None else ""
        if not label or not (self._home(subject_id) / label).is_dir():
            do = "a preview is there while a job trains the subject; see `raybooth models`"
            raise NotPublishedError(f"{subject_id!r} has no such preview now", label, do)
        return label

    def _home(self, subject_id: str) -> Path:
        """The subject's folder; that of one not seen is a place where nothing is."""
        return self.root / (subject_id if is_seen(self.seen, subject_id) else ".unseen")

    def _names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        with os.scandir(self.root) as entries:
            return sorted(entry.name for entry in entries if self._may_be(entry))

    def _may_be(self, entry: os.DirEntry[str]) -> bool:
        """Whether an entry of the root can be the folder of a subject that is seen."""
        is_named = _NAME.fullmatch(entry.name) is not None and is_seen(self.seen, entry.name)
        return is_named and entry.is_dir()

    def _numbers(self, subject_id: str) -> list[int]:
        folder = self._home(subject_id)
        if not folder.is_dir():
            return []
        with os.scandir(folder) as entries:
            return [int(e.name) for e in entries if e.name.isdecimal() and e.is_dir()]

    def _aliases(self, subject_id: str) -> Aliases:
        return Aliases(self._home(subject_id))

    def _unknown(self, subject_id: str) -> NotPublishedError:
        near = [n for n in near_names(subject_id, self._names()) if self._numbers(n)][:5]
        do = f"did you mean {', '.join(near)}?" if near else "see `raybooth models`"
        if _NAME.fullmatch(subject_id) and has_preview(self._home(subject_id)):
            do = f"its job still trains: {subject_id}@{PREVIEW} is there"
        return NotPublishedError(f"no subject {subject_id!r} is published", "", do)


def is_seen(globs: Sequence[str], subject_id: str) -> bool:
    """Whether one of `globs` fits the whole `subject_id`."""
    return any(fnmatchcase(subject_id, glob) for glob in globs)


def check_subject_id(subject_id: str) -> None:
    """InputError unless the id can be a folder and a DNS label."""
    if not _NAME.fullmatch(subject_id):
        do = "use lower-case letters, digits and inner hyphens, at most 63"
        raise InputError("this subject id cannot be used", repr(subject_id), do)


def _write_record(staging: Path, record: AnyRecord, changes: Mapping[str, object]) -> AnyRecord:
    """The record with `changes` and the time, in `staging`, everything there on the disk."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    final = record.model_copy(update={**changes, "created": created})
    (staging / RECORD).write_text(final.model_dump_json(indent=2) + "\n", "utf-8")
    sync_files(staging)
    return final
