"""Files of a full fine-tune: every weight of some parts of a base, one file a part, float32.

Keys are those of diffusers for the denoiser and the classic `text_model....` for text encoders.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raybooth.errors import BaseModelError, InputError
from raybooth.model.base import Base
from raybooth.model.files import WEIGHTS, read_json, weight_files

DENOISER = "unet"
_CLASSIC = "text_model."
_CONFIG_FILES = ("*.json", "*.txt", "*.model")


def part_file(part: str) -> str:
    """Name of the file that holds the weights of one folder of the base."""
    return f"{part}.safetensors"


def trained_parts(base: Base, *, text_encoder: bool) -> dict[str, nn.Module]:
    """The parts that a full run moves, by their folder in the base."""
    return {DENOISER: base.denoiser, **(base.text_encoders if text_encoder else {})}


def save_full(folder: Path, weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Path]:
    """Write the weights of each part, by the module's own names; returns the files by name."""
    files = {}
    for part, state in weights.items():
        path = folder / part_file(part)
        named = {
            _classic(part, key): value.detach().to("cpu", torch.float32).contiguous()
            for key, value in state.items()
        }
        save_file(named, path, metadata={"format": "pt"})
        files[path.name] = path
    return files


def load_full(base: Base, folder: Path, parts: Iterable[str]) -> None:
    """Put the published weights of `parts` in the place of the base's own, in its dtype.

    Raises BaseModelError when a file is missing, damaged or of another architecture.
    """
    modules = trained_parts(base, text_encoder=True)
    for part, state in read_full(base, folder, parts).items():
        modules[part].load_state_dict(state, strict=True)


def read_full(base: Base, folder: Path, parts: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The published weights of `parts` by the names of the base's own modules; raises so too."""
    modules = trained_parts(base, text_encoder=True)
    weights = {}
    for part in parts:
        if part not in modules:
            raise BaseModelError(f"the base has no part {part}", ", ".join(modules))
        own, path = modules[part].state_dict(), folder / part_file(part)
        state = {_named_as(key, own): value for key, value in _read(path).items()}
        foreign = sorted(
            key
            for key in own.keys() | state.keys()
            if key not in own or key not in state or own[key].shape != state[key].shape
        )
        if foreign:
            found = f"{len(foreign)} tensors, {foreign[0]} first"
            raise BaseModelError(f"{path} does not fit the base", found)
        weights[part] = state
    return weights


def write_pipeline(base_folder: Path, weights_folder: Path, out: Path) -> None:
    """A whole pipeline in diffusers' layout: the base in `base_folder`, its trained parts replaced.

    `weights_folder` holds files of `save_full`. `out` appears whole or not at all; raises
    InputError when it exists or cannot be written, BaseModelError for damaged weights.
    """
    if out.exists():
        raise InputError(f"{out} exists", "a file or folder", "give a name that is free")
    staging = out.with_name(f".{out.name}.{uuid4().hex}")
    try:
        staging.mkdir(parents=True)
        index = base_folder / "model_index.json"
        shutil.copyfile(index, staging / index.name)
        for name, value in read_json(index).items():
            if isinstance(value, list) and (base_folder / name).is_dir():
                _write_part(base_folder / name, weights_folder / part_file(name), staging / name)
        staging.rename(out)
    except OSError as error:
        found = error.strerror or str(error)
        raise InputError(f"{out} cannot be written", found, "choose another place") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_part(source: Path, trained: Path, target: Path) -> None:
    target.mkdir()
    for pattern in _CONFIG_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)
    if source.name not in WEIGHTS:
        return
    stem = WEIGHTS[source.name]
    files = weight_files(source, stem)
    if trained.is_file():
        own = _keys(files)
        state = {_named_as(key, own): value for key, value in _read(trained).items()}
        save_file(state, target / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    for file in files:
        shutil.copyfile(file, target / file.name)
    if len(files) > 1:
        index = f"{stem}.safetensors.index.json"
        shutil.copyfile(source / index, target / index)


def _keys(files: Iterable[Path]) -> set[str]:
    keys: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as reader:
            keys.update(reader.keys())
    return keys


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        found = " ".join(str(error).split())[:200]
        raise BaseModelError(
            f"{path} cannot be read", found, "publish the subject again"
        ) from error


def _classic(part: str, key: str) -> str:
    """transformers 5.6 dropped `text_model.` from one of its two classes; files always have it."""
    if part == DENOISER or key.startswith((_CLASSIC, "text_projection.")):
        return key
    return _CLASSIC + key


def _named_as(key: str, own: Mapping[str, Any] | set[str]) -> str:
    plain = key.removeprefix(_CLASSIC)
    return plain if key not in own and plain in own else key
