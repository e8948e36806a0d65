"""The newest checkpoint of a running job, as a model: replaced whole, never half.

`preview-<train step>-<content>/` beside the versions holds weights and record, and `preview.json`
names the one that counts. The one before it stays until the next, for readers that began with it.
Whoever changes them holds the subject's lock (see store.py).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from raybooth.atomic import sync_folder, write_atomic
from raybooth.config import Strict
from raybooth.errors import StoreError
from raybooth.records import FileRecord

PREVIEW = "preview"
"""What requests call the newest one: `subject@preview`."""

POINTER = "preview.json"
_LABEL = re.compile(r"preview-[0-9]+-[0-9a-f]{8}")


class PreviewPointer(Strict):
    """`preview.json`: which preview counts, and whose it is."""

    schema_version: int = 1
    label: str
    job_id: str


def is_preview(label: str) -> bool:
    """Whether `subject@label` means a preview: the newest, or one by its own label."""
    return label == PREVIEW or _LABEL.fullmatch(label) is not None


def preview_label(train_step: int, job_id: str, files: Mapping[str, FileRecord]) -> str:
    """A name that no other content of the subject has."""
    digests = "".join(f"{name}:{files[name].sha256}" for name in sorted(files))
    content = hashlib.sha256(f"{job_id}/{digests}".encode()).hexdigest()
    return f"{PREVIEW}-{train_step}-{content[:8]}"


def has_preview(folder: Path) -> bool:
    """Whether the subject in `folder` has a preview, readable or not."""
    return (folder / POINTER).exists()


def newest_preview(folder: Path) -> PreviewPointer | None:
    """The preview of the subject in `folder`; StoreError when its pointer is damaged."""
    path = folder / POINTER
    try:
        return PreviewPointer.model_validate(json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, ValidationError) as error:
        found = " ".join(str(error).split())[:200]
        raise StoreError(f"{path} is not readable", found, "delete it") from error


def replace_preview(folder: Path, staging: Path, label: str, job_id: str) -> None:
    """Make the files of `staging` the subject's preview; the one before stays for its readers."""
    before = newest_preview(folder)
    if not (folder / label).exists():  # a resumed job writes the same one again
        staging.rename(folder / label)
        sync_folder(folder)
    pointer = PreviewPointer(label=label, job_id=job_id)
    write_atomic(folder / POINTER, pointer.model_dump_json() + "\n")
    kept = {label, before.label if before is not None else label}
    for path in folder.glob(f"{PREVIEW}-*"):
        if path.name not in kept:
            shutil.rmtree(path)


def remove_preview(folder: Path) -> None:
    """The subject has no preview any more."""
    (folder / POINTER).unlink(missing_ok=True)
    for path in folder.glob(f"{PREVIEW}-*"):
        shutil.rmtree(path)
