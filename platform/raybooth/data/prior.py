"""The prior cache: class images, latents and prompt embedding, by content, made once (no ray).

    <root>/<digest>/record.json                    key, seed and checksums of every image
                    images/00000.png               what the base drew
                    latents/00000.safetensors      mean, std of its VAE posterior
                    conditioning.safetensors       embedding of the class prompt
    <root>/leases/<digest>/                        who is writing

N images, C H W latent channels, height, width.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from raybooth.data.generated import Generate, GeneratedPrior, GeneratedPrompt
from raybooth.data.lease import Lease
from raybooth.data.prior_key import PriorKey, image_seed, prior_key
from raybooth.data.prior_record import (
    PROMPT,
    RECORD,
    ImageRecord,
    PriorRecord,
    Survey,
    image_path,
    is_whole,
    latents_path,
    num_pictures,
    read_record,
    survey,
)
from raybooth.data.whole_file import (
    read_checked,
    remove_partial,
    sha256_hex,
    way_out,
    write_whole,
)
from raybooth.errors import PriorError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "GeneratedPrior",
    "GeneratedPrompt",
    "PriorCache",
    "PriorEntry",
    "PriorKey",
    "PriorReport",
    "PriorStatus",
    "PriorTensors",
    "image_seed",
    "prior_key",
]

log = logging.getLogger(__name__)

LEASES = "leases"
TRASH = ".trash-"
FIRST_POLL_S, LAST_POLL_S = 0.1, 2.0


OnProgress = Callable[[int, int], None]
"""Called with (images that are there, images wanted)."""


@dataclass(frozen=True)
class PriorStatus:
    """What the cache holds of one key."""

    num_whole: int
    num_damaged: int
    size_bytes: int


@dataclass(frozen=True)
class PriorReport:
    """What `ensure` found and did."""

    num_cached: int
    num_generated: int
    num_damaged: int
    seconds: float


@dataclass(frozen=True)
class PriorTensors:
    """A prior as training wants it (posterior without the scaling factor, fp32, on the CPU)."""

    mean_NCHW: Tensor
    std_NCHW: Tensor
    conditioning: dict[str, Tensor]
    """Of the class prompt, leading dimension 1."""
    image_digests: tuple[str, ...]
    """sha256 of the PNG files."""


@dataclass(frozen=True)
class PriorEntry:
    """One prior of the cache, for people; `key` is None when the record is damaged."""

    digest: str
    key: PriorKey | None
    base_name: str
    status: PriorStatus
    used_at: float
    """Seconds since the epoch at which it was last made, grown or loaded."""


class PriorCache:
    """Priors under `root`, shared by every process and node that sees the folder.

    Every method raises PriorError when the folder cannot be read or written.
    """

    def __init__(
        self, root: Path, *, lease_expiry_s: float = 120.0, heartbeat_s: float = 5.0
    ) -> None:
        self.root = root
        self._lease_expiry_s, self._heartbeat_s = lease_expiry_s, heartbeat_s

    def status(self, key: PriorKey) -> PriorStatus:
        """How much of this prior is there and whole (every checksum is checked)."""
        with _clear_errors(self.root, "read"):
            return _status(self.root / key.digest)

    def ensure(
        self,
        key: PriorKey,
        num_images: int,
        generate: Generate,
        on_progress: OnProgress | None = None,
        *,
        base_name: str = "",
    ) -> PriorReport:
        """The prior holds images 0 .. num_images-1 after this; only what is missing is generated.

        One caller at a time generates, on whatever node; the others wait and find it done.
        Each image is kept as soon as it is whole, damaged ones are remade and counted.
        """
        began = time.monotonic()
        tell = on_progress or (lambda done, wanted: None)
        folder = self.root / key.digest
        with _clear_errors(self.root, "read"):
            found = survey(folder, key, num_images)
        num_damaged, num_generated = 0, 0
        if not found.complete:
            lease = self._wait_for_lease(key, num_images, tell)
            try:
                with _clear_errors(self.root, "read"):
                    found = survey(folder, key, num_images)  # the last holder may have made it
                num_damaged, num_generated = found.num_damaged, len(found.missing)
                if not found.complete:
                    self._fill(folder, found, num_images, lease, generate, tell, base_name)
            finally:
                lease.release()
        _mark_used(folder)
        tell(num_images, num_images)
        seconds = time.monotonic() - began
        return PriorReport(num_images - num_generated, num_generated, num_damaged, seconds)

    def load(self, key: PriorKey, num_images: int) -> PriorTensors:
        """Images 0 .. num_images-1 as latents, checked; PriorError when not all are there."""
        import torch
        from safetensors.torch import load

        folder = self.root / key.digest
        with _clear_errors(self.root, "read"):
            files = _read_latents(folder, num_images)
            if files is None:  # perhaps written anew while we read
                files = _read_latents(folder, num_images)
            if files is None:
                missing = survey(folder, key, num_images).missing
                found = f"{num_images - len(missing)} of {num_images} images"
                what = f"the prior {key.class_prompt!r} is not complete"
                raise PriorError(what, found, "run `raybooth prior build`, or train again")
            _mark_used(folder)
        prompt, latents, digests = files
        rows = [load(data) for data in latents]
        return PriorTensors(
            mean_NCHW=torch.stack([row["mean"] for row in rows]).float(),
            std_NCHW=torch.stack([row["std"] for row in rows]).float(),
            conditioning=load(prompt),
            image_digests=digests,
        )

    def entries(self) -> list[PriorEntry]:
        """Every prior of the cache, by class prompt."""
        with _clear_errors(self.root, "read"):
            if not self.root.is_dir():
                return []
            folders = [path for path in self.root.iterdir() if _is_entry(path)]
            entries = [_entry(folder) for folder in folders]
        return sorted(entries, key=lambda e: (e.key.class_prompt if e.key else "", e.digest))

    def gc(
        self,
        *,
        older_than: timedelta | None = None,
        keep: Iterable[str] | None = None,
        dry_run: bool = False,
    ) -> list[PriorEntry]:
        """Deletes priors unused for `older_than` and not in `keep` (digests); returns them.

        Both None deletes all. A prior that is being made stays.
        """
        kept = set(keep or ())
        latest = time.time() - older_than.total_seconds() if older_than is not None else None
        deleted = []
        for entry in self.entries():
            if entry.digest in kept or (latest is not None and entry.used_at > latest):
                continue
            if dry_run or self._delete(entry.digest):
                deleted.append(entry)
        if not dry_run:
            self._empty_trash()
        return deleted

    def _wait_for_lease(self, key: PriorKey, num_images: int, tell: OnProgress) -> Lease:
        lease, pause_s = self._lease(key.digest), FIRST_POLL_S
        while True:
            with _clear_errors(self.root, "write"):
                if lease.try_acquire():
                    return lease
                record = read_record(self.root / key.digest)
            images = record.images if record is not None else {}
            tell(sum(index < num_images for index in images), num_images)
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, LAST_POLL_S)

    def _fill(
        self,
        folder: Path,
        found: Survey,
        num_images: int,
        lease: Lease,
        generate: Generate,
        tell: OnProgress,
        base_name: str,
    ) -> None:
        record, wanted, prompt_wanted = found.record, set(found.missing), found.prompt_missing
        prompt = record.key.class_prompt
        if found.num_damaged:
            log.warning(
                "the prior %r has %d damaged files, they are made again (%s)",
                prompt,
                found.num_damaged,
                folder,
            )
        record.base_name = base_name or record.base_name
        with _clear_errors(self.root, "write"):
            for part in (folder, folder / "images", folder / "latents"):
                part.mkdir(parents=True, exist_ok=True)
                remove_partial(part)
        tell(num_images - len(wanted), num_images)
        for made in generate(found.missing):
            if not lease.held:
                what = f"the prior {prompt!r} was taken over by another process"
                evidence = f"this one showed no sign of life for {self._lease_expiry_s:g} s"
                raise PriorError(what, evidence, "run the same command again")
            with _clear_errors(self.root, "write"):
                if isinstance(made, GeneratedPrior) and made.index in wanted:
                    _write_image(folder, record, made)
                    wanted.discard(made.index)
                elif isinstance(made, GeneratedPrompt) and prompt_wanted:
                    write_whole(folder / PROMPT, made.conditioning)
                    record.prompt_sha256, prompt_wanted = sha256_hex(made.conditioning), False
                else:
                    continue
                record.write(folder)
            tell(num_images - len(wanted), num_images)
        if wanted or prompt_wanted:
            evidence = f"{len(wanted)} images missing" if wanted else "no prompt embedding"
            what = f"the prior {prompt!r} was not made whole"
            raise PriorError(what, evidence, "run the same command again")

    def _delete(self, digest: str) -> bool:
        with _clear_errors(self.root, "write"):
            lease = self._lease(digest)
            if not lease.try_acquire():
                log.warning("the prior %s is being made and stays", digest)
                return False
            try:
                (self.root / digest).rename(self.root / f"{TRASH}{uuid.uuid4().hex}")
            except FileNotFoundError:
                return False
            finally:
                lease.release()
        return True

    def _empty_trash(self) -> None:
        with _clear_errors(self.root, "write"):
            for folder in self.root.glob(f"{TRASH}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _lease(self, digest: str) -> Lease:
        folder = self.root / LEASES / digest
        return Lease(folder, expiry_s=self._lease_expiry_s, heartbeat_s=self._heartbeat_s)


@contextmanager
def _clear_errors(root: Path, verb: str) -> Iterator[None]:
    """File system errors as PriorError."""
    try:
        yield
    except OSError as error:
        found = f"{error.strerror or error} ({error.filename or root})"
        what = f"the prior cache {root} cannot be {verb if verb == 'read' else 'written'}"
        raise PriorError(what, found, way_out(error)) from error


def _status(folder: Path) -> PriorStatus:
    record = read_record(folder)
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if record is None:
        return PriorStatus(0, num_pictures(folder), size_bytes)
    whole = sum(is_whole(folder, index, image) for index, image in record.images.items())
    return PriorStatus(whole, len(record.images) - whole, size_bytes)


def _write_image(folder: Path, record: PriorRecord, made: GeneratedPrior) -> None:
    picture = image_path(folder, made.index)
    write_whole(picture, made.png)
    try:
        write_whole(latents_path(folder, made.index), made.latents)
    except OSError:
        picture.unlink(missing_ok=True)
        raise
    record.images[made.index] = ImageRecord(
        seed=image_seed(record.key, made.index),
        image_sha256=sha256_hex(made.png),
        latents_sha256=sha256_hex(made.latents),
        size_bytes=len(made.png) + len(made.latents),
    )


def _read_latents(
    folder: Path, num_images: int
) -> tuple[bytes, list[bytes], tuple[str, ...]] | None:
    record = read_record(folder)
    if record is None or any(index not in record.images for index in range(num_images)):
        return None
    images = [record.images[index] for index in range(num_images)]
    latents = [
        read_checked(latents_path(folder, index), image.latents_sha256)
        for index, image in enumerate(images)
    ]
    prompt = read_checked(folder / PROMPT, record.prompt_sha256)
    whole = [data for data in latents if data is not None]
    if prompt is None or len(whole) < num_images:
        return None
    return prompt, whole, tuple(image.image_sha256 for image in images)


def _entry(folder: Path) -> PriorEntry:
    record = read_record(folder)
    try:
        used_at = (folder / RECORD).stat().st_mtime
    except FileNotFoundError:
        used_at = folder.stat().st_mtime
    key, base_name = (record.key, record.base_name) if record else (None, "")
    return PriorEntry(folder.name, key, base_name, _status(folder), used_at)


def _is_entry(path: Path) -> bool:
    return path.is_dir() and path.name != LEASES and not path.name.startswith(".")


def _mark_used(folder: Path) -> None:
    """Moves `used_at`; on a read-only cache it stays, which only gc could notice."""
    try:
        os.utime(folder / RECORD)
    except OSError:
        log.debug("the use of %s was not noted", folder)
