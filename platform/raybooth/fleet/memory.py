"""Predicts the memory of a pack from the shapes of its base; reads headers, never weights.

bytes = process + base + S slots x 4 P x 4 bytes + rows x activations(resolution, dtype)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybooth.config import Precision
from raybooth.errors import BaseModelError
from raybooth.model.files import WEIGHTS

PROCESS_BYTES = 1 << 30
"""Interpreter, libraries and device context, before any weight is loaded (measured)."""

SAVED_PER_UNIT = 40
"""Tensors saved for backward per (pixel, channel, block): 24 to 36 counted with saved-tensor hooks
on the meta device for the pocket base and Stable Diffusion 1.5 (attention not materialised)."""

TRANSIENT = 1.3
"""Backward's temporaries over the saved activations."""

STATES_PER_PARAMETER = 4
"""fp32 master, gradient and two Adam moments."""

BYTES: Mapping[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class BaseShape:
    """The figures of a base that decide memory."""

    denoiser: Mapping[str, tuple[int, ...]]
    """Shape of every weight of the denoiser, by name."""

    num_other_parameters: int
    """Of the VAE and text encoders."""

    block_channels: tuple[int, ...]
    layers_per_block: int
    vae_scale_factor: int
    """Pixels of a latent pixel's side; every picture's side is a multiple of it."""

    native_resolution: int
    """Pixels of the side that the base was trained at."""

    @property
    def num_denoiser_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.denoiser.values())

    @property
    def least_side(self) -> int:
        """Pixels of the smallest picture: one latent pixel at the bottom of the denoiser."""
        return int(self.vae_scale_factor * 2 ** (len(self.block_channels) - 1))


@dataclass(frozen=True, slots=True)
class SlotShape:
    """What one subject adds to a pack."""

    rank: int
    num_rows: int


def read_base_shape(folder: Path) -> BaseShape:
    """The shape of the base in `folder`, from config.json files and safetensors headers alone."""
    unet = _config(folder / "unet")
    vae = _config(folder / "vae")
    factor = int(2 ** (len(vae.get("block_out_channels", (64,))) - 1))
    parts = [part for part in WEIGHTS if part != "unet" and (folder / part).is_dir()]
    others = [shape for part in parts for shape in _weights(folder / part).values()]
    return BaseShape(
        denoiser=_weights(folder / "unet"),
        num_other_parameters=sum(math.prod(shape) for shape in others),
        block_channels=tuple(unet.get("block_out_channels", (320, 640, 1280, 1280))),
        layers_per_block=_most(unet.get("layers_per_block", 2)),
        vae_scale_factor=factor,
        native_resolution=int(unet.get("sample_size") or 64) * factor,
    )


def adapter_parameters(shape: BaseShape, targets: Sequence[str], rank: int) -> int:
    """Parameters of a LoRA on modules of these suffixes: sum of rank x (in x kernel + out)."""
    total = 0
    for name, dims in shape.denoiser.items():
        if any(is_target(name, suffix) and len(dims) > 1 for suffix in targets):
            total += rank * (math.prod(dims[1:]) + dims[0])
    return total


def is_target(weight: str, suffix: str) -> bool:
    """Whether the denoiser's weight of this name belongs to a module of this suffix."""
    site = weight.removesuffix(".weight")
    return site != weight and (site == suffix or site.endswith("." + suffix))


def pack_memory_bytes(
    shape: BaseShape,
    slots: Sequence[SlotShape],
    *,
    targets: Sequence[str],
    resolution: int,
    precision: Precision,
) -> int:
    """Predicted bytes of a worker that trains these slots together."""
    item = BYTES[precision]
    weights = (shape.num_denoiser_parameters + shape.num_other_parameters) * item
    rank = max((slot.rank for slot in slots), default=0)  # slots are padded to the largest
    states = len(slots) * adapter_parameters(shape, targets, rank) * STATES_PER_PARAMETER * 4
    rows = sum(slot.num_rows for slot in slots)
    activations = rows * activation_elements(shape, resolution) * item * TRANSIENT
    return int(PROCESS_BYTES + weights + states + activations)


def activation_elements(shape: BaseShape, resolution: int) -> int:
    """Elements that a row saves for backward: sum over levels of pixels x channels x blocks."""
    side = resolution // shape.vae_scale_factor
    blocks = 2 * shape.layers_per_block + 1
    units: int = sum(
        math.ceil(side / 2**level) ** 2 * channels * blocks
        for level, channels in enumerate(shape.block_channels)
    )
    return SAVED_PER_UNIT * units


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: 8 bytes of length, then that much JSON."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100 << 20:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(file.read(length))
            return header
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path} is not a safetensors file", str(error)) from error


def _weights(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in read_header(path).items():
            if name != "__metadata__":
                shapes[name] = tuple(entry["shape"])
    if not shapes:
        do = "a base needs safetensors weights in diffusers' layout"
        raise BaseModelError(f"{folder} holds no safetensors weights", "none", do)
    return shapes


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values
    except (OSError, ValueError) as error:
        do = "a base is a folder in diffusers' layout"
        raise BaseModelError(f"{path} cannot be read", str(error), do) from error


def _most(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else max(value)
