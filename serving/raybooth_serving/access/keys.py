"""API keys: shown once, kept as hashes in RAYBOOTH_HOME/keys.json, read anew when that changes.

A key is `rb_` and 256 random bits. Passwords need a slow, salted hash because people choose them
from a few billion; nobody finds a preimage among 2**256 by trying, so one SHA-256 is enough and
costs a microsecond for each request. Every hash is compared, each in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, Field, TypeAdapter, ValidationError

from raybooth.atomic import locked, write_atomic
from raybooth.config import Strict
from raybooth.errors import InputError, StoreError

PREFIX = "rb_"
FILE = "keys.json"
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_GLOB = re.compile(r"[a-z0-9*?\[\]!-]{1,63}")

logger = logging.getLogger(__name__)


class KeyRecord(Strict):
    """One key, without its secret."""

    name: str
    id: str
    """Public: what logs, metrics and the scheduler call the key."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the secret, hexadecimal."""

    subjects: tuple[str, ...] = ()
    """Globs of subject ids that it may see; none: only the bases."""

    images_per_minute: float | None = Field(None, gt=0)
    """None: as many as the endpoint can make."""

    created: AwareDatetime
    expires: AwareDatetime | None = None

    def is_expired(self, now: datetime) -> bool:
        """Whether it is past its time."""
        return self.expires is not None and now >= self.expires


class KeyFile(Strict):
    """`keys.json`."""

    schema_version: Literal[1] = 1
    keys: tuple[KeyRecord, ...] = ()


class Keyring:
    """The keys of one file; several processes may change it, any number may read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[tuple[int, ...], tuple[KeyRecord, ...]] = ((), ())
        """What the file looked like, and held: one value, for threads that read at once."""

    def read(self) -> tuple[KeyRecord, ...]:
        """The keys now, parsed only when the file has changed; no file, no keys.

        Raises StoreError when the file cannot be read or is damaged.
        """
        try:
            looks = self.path.stat()
            stamp = (looks.st_mtime_ns, looks.st_size, looks.st_ino)
            known = self._known
            if stamp != known[0]:
                known = stamp, KeyFile.model_validate_json(self.path.read_bytes()).keys
        except FileNotFoundError:
            known = (), ()
        except (OSError, ValidationError) as error:
            found = error.strerror if isinstance(error, OSError) else "not a file of keys"
            do = "mend or remove it, then create keys anew with `raybooth keys create`"
            raise StoreError(f"{self.path} cannot be read", str(found), do) from error
        self._known = known
        return known[1]

    def refresh(self) -> None:
        """Read the keys that `find` knows; those read last go on where the file cannot be read.

        So a volume that is away for a minute stops nobody, and no revocation is missed: revoking
        writes this same file.
        """
        try:
            self.read()
        except StoreError as error:
            logger.error("the API keys read last go on: %s", error)

    def find(self, secret: bytes) -> KeyRecord | None:
        """The key of `secret`, of those read last."""
        digest = hash_secret(secret)
        match: KeyRecord | None = None
        for key in self._known[1]:
            if hmac.compare_digest(key.sha256, digest):
                match = key
        return match

    def create(
        self,
        name: str,
        *,
        subjects: Sequence[str] = (),
        images_per_minute: float | None = None,
        expires: datetime | None = None,
    ) -> tuple[KeyRecord, str]:
        """A new key and its secret, which is nowhere else; raises InputError, StoreError."""
        _check(name, subjects)
        now = datetime.now(UTC)
        if expires is not None and expires <= now:
            raise InputError("this key would be expired at once", expires.isoformat(), "say later")
        secret = new_secret()
        key = KeyRecord(
            name=name,
            id=secrets.token_hex(4),
            sha256=hash_secret(secret.encode()),
            subjects=tuple(subjects),
            images_per_minute=images_per_minute,
            created=now.replace(microsecond=0),
            expires=expires,
        )
        with self._changing():
            keys = self.read()
            if any(other.name == name for other in keys):
                do = "revoke it first, or choose another name"
                raise InputError("a key has this name", repr(name), do)
            self._write((*keys, key))
        return key, secret

    def rotate(self, name: str) -> tuple[KeyRecord, str]:
        """The key `name` with another secret; the old one is refused from now on."""
        secret = new_secret()
        with self._changing():
            old = self._named(name)
            new = old.model_copy(update={"sha256": hash_secret(secret.encode())})
            self._write(tuple(new if key is old else key for key in self.read()))
        return new, secret

    def revoke(self, name: str) -> KeyRecord:
        """The key that was `name`; refused from now on."""
        with self._changing():
            gone = self._named(name)
            self._write(tuple(key for key in self.read() if key is not gone))
        return gone

    def _named(self, name: str) -> KeyRecord:
        keys = self.read()
        for key in keys:
            if key.name == name:
                return key
        known = ", ".join(key.name for key in keys) or "none"
        raise InputError(f"no key is called {name!r}", f"keys {known}", "see `raybooth keys ls`")

    def _changing(self) -> AbstractContextManager[None]:
        """One writer at a time, also between processes."""
        return locked(self.path.with_suffix(".lock"))

    def _write(self, keys: tuple[KeyRecord, ...]) -> None:
        text = json.dumps(KeyFile(keys=keys).model_dump(mode="json"), indent=2) + "\n"
        write_atomic(self.path, text, mode=0o600)


def hash_secret(secret: bytes) -> str:
    """What is kept of a secret; see this file's top."""
    return hashlib.sha256(secret).hexdigest()


def new_secret() -> str:
    """`rb_` and 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def parse_expiry(text: str) -> datetime:
    """`2027-01-31` (through the end of that day, UTC) or a time in ISO 8601 with its offset."""
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
            return datetime.fromisoformat(f"{text}T23:59:59+00:00")
        aware = TypeAdapter(AwareDatetime).validate_python(datetime.fromisoformat(text))
        return aware.astimezone(UTC)
    except ValueError as error:
        do = "write it as 2027-01-31 or 2027-01-31T12:00:00+00:00"
        raise InputError("this expiry is not understood", repr(text), do) from error


def _check(name: str, subjects: Sequence[str]) -> None:
    if not _NAME.fullmatch(name):
        do = "use lower-case letters, digits and inner hyphens, dots or underscores, at most 63"
        raise InputError("this key name cannot be used", repr(name), do)
    for glob in subjects:
        if not _GLOB.fullmatch(glob):
            do = "write globs of subject ids such as 'dog-*' or '*', without @version"
            raise InputError("this is no glob of subjects", repr(glob), do)
