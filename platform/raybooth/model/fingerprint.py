"""Which base is this? A sha256 of what its files mean, not of where or how they are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raybooth.errors import BaseModelError

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
"""Subfolder and stem of each weight file."""

_CONFIGS = (
    *("unet/config.json", "vae/config.json", "text_encoder/config.json"),
    *("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"),
)
_VOCABULARIES = ("vocab.json", "merges.txt")
_VOLATILE = ("transformers_version", "torch_dtype", "dtype", "architectures", "name_or_path")
_CHUNK_BYTES = 1 << 22
_DO = "get a whole copy in diffusers' layout, with safetensors"
_known: dict[Path, tuple[tuple[tuple[str, int, int], ...], str]] = {}


def fingerprint_base(folder: Path) -> str:
    """sha256 hex over weights (name, dtype, shape, bytes), configs and vocabulary of a base.

    Independent of the folder's path, sharding, file headers, library versions, and of the dtype
    and device that it is loaded with. Kept in memory while size and time of the files stay.
    Raises BaseModelError when a file is missing or damaged.
    """
    folder = Path(folder).resolve()
    stamp = _stamp(folder)
    if folder in _known and _known[folder][0] == stamp:
        return _known[folder][1]
    digest = hashlib.sha256(b"raybooth base 1")
    for name in _CONFIGS:
        digest.update(f"\0{name}\0".encode())
        digest.update(json.dumps(_lasting(read_json(folder / name)), sort_keys=True).encode())
    for part in _vocabulary(folder / "tokenizer"):
        digest.update(b"\0" + part)
    for part_name, stem in WEIGHTS.items():
        for key, label, chunks in sorted(_tensors(folder / part_name, stem), key=lambda t: t[0]):
            digest.update(f"\0{part_name}\0{key}\0{label}\0".encode())
            for chunk in chunks:
                digest.update(chunk)
    _known[folder] = stamp, digest.hexdigest()
    return digest.hexdigest()


def weight_files(part: Path, stem: str) -> list[Path]:
    """The safetensors files of a component; BaseModelError when there is none, or only a pickle."""
    index = part / f"{stem}.safetensors.index.json"
    if index.is_file():
        return [part / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if (part / f"{stem}.safetensors").is_file():
        return [part / f"{stem}.safetensors"]
    pickles = [
        f.name for f in sorted(part.glob("*")) if f.suffix in (".bin", ".pt", ".pth", ".ckpt")
    ]
    if pickles:
        raise BaseModelError(
            f"the base keeps {part.name} as a pickle, which runs code when it is read",
            pickles[0],
            "get the safetensors version, or save it with `safe_serialization=True`",
        )
    raise BaseModelError(
        f"the base lacks the weights of {part.name}",
        f"no {part.name}/{stem}.safetensors",
        _DO,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a base; BaseModelError when it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        found = error.strerror or str(error)
        raise BaseModelError(
            f"the base lacks {path.parent.name}/{path.name}", found, _DO
        ) from error
    except ValueError as error:
        raise BaseModelError(f"{path} is not JSON", str(error), _DO) from error
    if not isinstance(values, dict):
        raise BaseModelError(f"{path} is not a JSON object", type(values).__name__, _DO)
    return values


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    stamps = []
    for part in (*WEIGHTS, "scheduler", "tokenizer"):
        for file in sorted((folder / part).glob("*")):
            status = file.stat()
            stamps.append((f"{part}/{file.name}", status.st_size, status.st_mtime_ns))
    return tuple(stamps)


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in _VOLATILE}


def _vocabulary(part: Path) -> Iterator[bytes]:
    files = [part / name for name in _VOCABULARIES if (part / name).is_file()]
    for file in files or [part / "tokenizer.json"]:
        try:
            yield file.read_bytes()
        except OSError as error:
            found = error.strerror or str(error)
            raise BaseModelError(f"the base lacks tokenizer/{file.name}", found) from error


def _tensors(part: Path, stem: str) -> Iterator[tuple[str, str, Iterator[bytes]]]:
    """Name, dtype with shape, and bytes of every tensor; CLIP keys in one of their two forms."""
    for file in weight_files(part, stem):
        header, start = _header(file)
        for key, entry in header.items():
            name = key.removeprefix("text_model.") if part.name == "text_encoder" else key
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
