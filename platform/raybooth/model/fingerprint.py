"""Which base is this? A sha256 of what its files mean, not of where or how they are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raybooth.errors import BaseModelError
from raybooth.model.families import family_of
from raybooth.model.files import WEIGHTS, read_json, weight_files

_VOCABULARIES = ("vocab.json", "merges.txt")
_VOLATILE = ("transformers_version", "torch_dtype", "dtype", "architectures", "name_or_path")
_CHUNK_BYTES = 1 << 22
_known: dict[Path, tuple[tuple[tuple[str, int, int], ...], str]] = {}


def fingerprint_base(folder: Path) -> str:
    """sha256 hex over weights (name, dtype, shape, bytes), configs and vocabulary of a base.

    Independent of the folder's path, sharding, file headers, library versions, and of the dtype
    and device that it is loaded with. Kept in memory while size and time of the files stay.
    Raises BaseModelError when a file is missing or damaged.
    """
    folder = Path(folder).resolve()
    family = family_of(folder)
    weights, tokenizers = family.weight_folders, family.tokenizer_folders
    stamp = _stamp(folder, (*weights, "scheduler", *tokenizers))
    if folder in _known and _known[folder][0] == stamp:
        return _known[folder][1]
    digest = hashlib.sha256(b"raybooth base 1")
    if family.negative_is_zeros(folder):
        digest.update(b"\0negative is zeros")
    configs = [f"{part}/config.json" for part in weights]
    configs += ["scheduler/scheduler_config.json"]
    configs += [f"{part}/tokenizer_config.json" for part in tokenizers]
    for name in configs:
        digest.update(f"\0{name}\0".encode())
        digest.update(json.dumps(_lasting(read_json(folder / name)), sort_keys=True).encode())
    for tokenizer in tokenizers:
        for words in _vocabulary(folder / tokenizer):
            digest.update(b"\0" + words)
    for part in weights:
        for key, label, chunks in sorted(_tensors(folder / part, WEIGHTS[part]), key=_first):
            digest.update(f"\0{part}\0{key}\0{label}\0".encode())
            for chunk in chunks:
                digest.update(chunk)
    _known[folder] = stamp, digest.hexdigest()
    return digest.hexdigest()


def _stamp(folder: Path, parts: tuple[str, ...]) -> tuple[tuple[str, int, int], ...]:
    stamps = []
    for file in (
        folder / "model_index.json",
        *(file for part in parts for file in sorted((folder / part).glob("*"))),
    ):
        status = file.stat()
        name = file.relative_to(folder).as_posix()
        stamps.append((name, status.st_size, status.st_mtime_ns))
    return tuple(stamps)


def _first(tensor: tuple[str, str, Iterator[bytes]]) -> str:
    return tensor[0]


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in _VOLATILE}


def _vocabulary(part: Path) -> Iterator[bytes]:
    files = [part / name for name in _VOCABULARIES if (part / name).is_file()]
    for file in files or [part / "tokenizer.json"]:
        try:
            yield file.read_bytes()
        except OSError as error:
            found = error.strerror or str(error)
            raise BaseModelError(f"the base lacks {part.name}/{file.name}", found) from error


def _tensors(part: Path, stem: str) -> Iterator[tuple[str, str, Iterator[bytes]]]:
    """Name, dtype with shape, and bytes of every tensor; CLIP keys in one of their two forms."""
    for file in weight_files(part, stem):
        header, start = _header(file)
        for key, entry in header.items():
            name = key.removeprefix("text_model.") if part.name.startswith("text_encoder") else key
            if key == "__metadata__" or name == "embeddings.position_ids":
                continue
            begin, end = entry["data_offsets"]
            label = f"{entry['dtype']} {entry['shape']}"
            yield name, label, _chunks(file, start + begin, start + end)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(stream.read(size))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{file} is not a readable safetensors file", str(error)) from error
    end = max((e["data_offsets"][1] for k, e in header.items() if k != "__metadata__"), default=0)
    if 8 + size + end != file.stat().st_size:
        found = f"{file.stat().st_size} bytes instead of {8 + size + end}"
        raise BaseModelError(f"{file} is cut short or damaged", found, "copy it again")
    return header, 8 + size


def _chunks(file: Path, begin: int, end: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(begin)
        while begin < end:
            chunk = stream.read(min(_CHUNK_BYTES, end - begin))
            begin += len(chunk)
            yield chunk
