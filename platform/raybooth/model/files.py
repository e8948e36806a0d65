"""The files of a base in diffusers' layout: safetensors and JSON (no torch)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raybooth.errors import BaseModelError

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Subfolder and stem of each weight file that a base may have."""

DO = "get a whole copy in diffusers' layout, with safetensors"


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
        DO,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a base; BaseModelError when it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        found = error.strerror or str(error)
        raise BaseModelError(f"the base lacks {path.parent.name}/{path.name}", found, DO) from error
    except ValueError as error:
        raise BaseModelError(f"{path} is not JSON", str(error), DO) from error
    if not isinstance(values, dict):
        raise BaseModelError(f"{path} is not a JSON object", type(values).__name__, DO)
    return values
