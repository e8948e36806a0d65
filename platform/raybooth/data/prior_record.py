"""The record of one prior: its key and the checksum of every file (no torch)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raybooth.data.prior_key import PriorKey
from raybooth.data.whole_file import seal, sha256_hex, unseal, write_whole
from raybooth.errors import PriorError

FORMAT = 1
RECORD = "record.json"
PROMPT = "conditioning.safetensors"


@dataclass(frozen=True)
class ImageRecord:
    """One prior image on disk."""

    seed: int
    image_sha256: str
    latents_sha256: str
    size_bytes: int


@dataclass
class PriorRecord:
    """What a prior's folder holds; files that it does not name do not count."""

    key: PriorKey
    base_name: str = ""
    prompt_sha256: str = ""
    images: dict[int, ImageRecord] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Replaces the record of `folder` whole; raises OSError."""
        images = {f"{i:05d}": asdict(image) for i, image in sorted(self.images.items())}
        values = {
            "format": FORMAT,
            "key": asdict(self.key),
            "base_name": self.base_name,
            "prompt_sha256": self.prompt_sha256,
            "images": images,
        }
        write_whole(folder / RECORD, seal(values))


def read_record(folder: Path) -> PriorRecord | None:
    """The record of `folder`; None when it is missing or damaged.

    Raises PriorError when a later RayBooth wrote it.
    """
    try:
        values: Any = unseal((folder / RECORD).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    if values is None:
        return None
    if values.get("format") != FORMAT:
        found = f"format {values.get('format')}, this version knows {FORMAT}"
        raise PriorError(f"the prior in {folder} is of another version", found, "upgrade RayBooth")
    images = {int(i): ImageRecord(**image) for i, image in values["images"].items()}
    key = PriorKey(**values["key"])
    return PriorRecord(key, values["base_name"], values["prompt_sha256"], images)


def image_path(folder: Path, index: int) -> Path:
    return folder / "images" / f"{index:05d}.png"


def latents_path(folder: Path, index: int) -> Path:
    return folder / "latents" / f"{index:05d}.safetensors"


@dataclass(frozen=True)
class Survey:
    """What is there of the first `num_images` of a prior, every checksum checked."""

    record: PriorRecord
    """Names whole files only."""
    missing: tuple[int, ...]
    prompt_missing: bool
    num_damaged: int
    """Images, and the prompt's embedding, that are recorded but not as they were written."""

    @property
    def complete(self) -> bool:
        return not self.missing and not self.prompt_missing


def survey(folder: Path, key: PriorKey, num_images: int) -> Survey:
    """Reads and checks the record and its files."""
    record = read_record(folder)
    if record is None or record.key != key:
        lost = num_pictures(folder) if (folder / RECORD).exists() else 0
        return Survey(PriorRecord(key), tuple(range(num_images)), True, lost)
    damaged = [
        index
        for index, image in record.images.items()
        if index < num_images and not is_whole(folder, index, image)
    ]
    for index in damaged:
        del record.images[index]
    prompt_damaged = bool(record.prompt_sha256) and not prompt_is_whole(folder, record)
    if prompt_damaged:
        record.prompt_sha256 = ""
    missing = tuple(index for index in range(num_images) if index not in record.images)
    num_damaged = len(damaged) + prompt_damaged
    return Survey(record, missing, not record.prompt_sha256, num_damaged)


def num_pictures(folder: Path) -> int:
    """PNG files, recorded or not."""
    return len(list((folder / "images").glob("[0-9]*.png")))


def is_whole(folder: Path, index: int, image: ImageRecord) -> bool:
    """Whether picture and latents have the recorded checksums."""
    return _has(image_path(folder, index), image.image_sha256) and _has(
        latents_path(folder, index), image.latents_sha256
    )


def prompt_is_whole(folder: Path, record: PriorRecord) -> bool:
    """Whether the prompt's embedding has the recorded checksum."""
    return _has(folder / PROMPT, record.prompt_sha256)


def _has(path: Path, sha256: str) -> bool:
    try:
        return sha256_hex(path.read_bytes()) == sha256
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
