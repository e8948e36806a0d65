"""Files that appear whole, in one rename, and locks that a killed process lets go."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def write_atomic(path: Path, text: str, mode: int = 0o666) -> None:
    """Put `text` at `path`: beside, fsync, rename; a reader sees old or new, never half.

    `mode` is the file's from its first byte on, less the umask.
    """
    staging = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        handle = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        _sync_file(staging)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One holder at a time, of all processes and threads that see `path` (flock, also on NFS)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync_files(folder: Path) -> None:
    """Every file of `folder`, and their names, are on the disk."""
    for path in folder.iterdir():
        _sync_file(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """The names in `folder` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
