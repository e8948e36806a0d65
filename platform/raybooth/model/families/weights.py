"""A part of a base through diffusers: safetensors alone, every weight from its file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.errors import BaseModelError

if TYPE_CHECKING:
    import torch

DO = "get a whole safetensors copy of the base"


def load_diffusers(kind: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """`part` of `folder` as a `kind` of diffusers; BaseModelError when a weight is not its own."""
    from safetensors import SafetensorError

    try:
        model, info = kind.from_pretrained(
            folder,
            subfolder=part,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(f"{folder / part} cannot be loaded", one_line(error), DO) from error
    check_keys(folder / part, set(info["missing_keys"]), set(info["unexpected_keys"]))
    return model


def check_keys(part: Path, missing: set[str], unexpected: set[str]) -> None:
    """BaseModelError unless the file held exactly the tensors of the part."""
    for word, keys in (("lacks", missing), ("has unknown", unexpected)):
        if keys:
            found = f"{min(keys)}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}"
            raise BaseModelError(f"{part} {word} tensors", found, DO)


def one_line(error: Exception) -> str:
    """A library's message, short enough for ours."""
    return " ".join(str(error).split())[:300]
