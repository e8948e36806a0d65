"""Files that are there whole or not at all, and known by their checksum."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".partial"


def write_whole(path: Path, data: bytes) -> None:
    """Puts `data` at `path`: beside, fsync, rename; a reader sees old or new, never half.

    A failed write (disk full, read-only) leaves nothing behind and raises its OSError.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_partial(folder: Path) -> None:
    """Deletes what killed writers left in `folder`; call it while no other writes there."""
    for entry in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        entry.unlink(missing_ok=True)


def sha256_hex(data: bytes) -> str:
    """The checksum by which a record knows a file."""
    return hashlib.sha256(data).hexdigest()


def read_checked(path: Path, sha256: str) -> bytes | None:
    """The bytes of `path` when they have this checksum; None when missing or damaged."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return data if sha256_hex(data) == sha256 else None


def seal(values: dict[str, Any]) -> bytes:
    """`values` as JSON with a checksum of itself in the key `sha256`."""
    body = json.dumps(values, sort_keys=True)
    return json.dumps(
        {**values, "sha256": sha256_hex(body.encode())}, sort_keys=True, indent=1
    ).encode()


def unseal(data: bytes) -> dict[str, Any] | None:
    """What `seal` sealed; None when a byte of it changed."""
    try:
        values = json.loads(data)
        claimed = values.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    body = json.dumps(values, sort_keys=True)
    return values if claimed == sha256_hex(body.encode()) else None


def way_out(error: OSError) -> str:
    """What a person can do about a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space and run the same command again (nothing half-written is left)"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make the folder writable, or set RAYBOOTH_HOME to one that is"
    return "check the folder and its file system, then run the same command again"
