"""Predicts the memory of a pack from the shapes of its base; reads headers, never weights.

bytes = process + base + (S + 1) slots x P x (fp32 master, gradient, moments) + activations

P counts LoRA sites of denoiser and text encoders, and learned tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybooth.config import Precision
from raybooth.config.adapter import matches_target
from raybooth.errors import BaseModelError
from raybooth.fleet.activations import Adapters, Rows, activation_bytes
from raybooth.fleet.text_memory import TextShape
from raybooth.model.files import WEIGHTS

PROCESS_BYTES = 1 << 30
"""Interpreter, libraries and device context, before any weight is loaded (measured)."""

BACKWARD_WIDTHS = 8
"""Tensors of the last block's width that backward has of its own when it starts (measured)."""

SLOT_BLOCK = 256
"""A slot is padded to a multiple of this."""

BYTES: Mapping[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class BaseShape:
    """The figures of a base that decide memory."""

    denoiser: Mapping[str, tuple[int, ...]]
    """Shape of every weight of the denoiser, by name."""

    num_other_parameters: int
    """Of the VAE and text encoders."""

    block_channels: tuple[int, ...]
    vae_scale_factor: int
    """Pixels of a latent pixel's side; every picture's side is a multiple of it."""

    native_resolution: int
    """Pixels of the side that the base was trained at."""

    texts: tuple[TextShape, ...] = ()
    """Its text encoders, which `num_other_parameters` counts as well."""

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
    eight_bit: bool = False
    """Whether its optimiser keeps two bytes a parameter, not eight."""

    num_prompts: int = 0
    """Prompts that its own text encoders read in a train step; 0: all text is cached."""


@dataclass(frozen=True, slots=True)
class TextTraining:
    """What the slots of a pack train in the text encoders."""

    targets: tuple[str, ...] = ()
    """Patterns of LoRA sites."""

    num_tokens: int = 0
    """Learned token embeddings, in each text encoder."""

    def __bool__(self) -> bool:
        return bool(self.targets or self.num_tokens)

    def parameters(self, shape: BaseShape, rank: int) -> int:
        """Of one slot."""
        sites = sum(text.adapter_parameters(self.targets, rank) for text in shape.texts)
        return sites + sum(self.num_tokens * text.width for text in shape.texts)

    def activation_bytes(self, shape: BaseShape, rank: int, rows: int, item: int) -> int:
        """Bytes kept by a forward of `rows` prompts through every text encoder."""
        texts = shape.texts if self else ()
        return sum(text.activation_bytes(self.targets, rank, rows, item) for text in texts)


CACHED_TEXT = TextTraining()
"""No text encoder trains; prompts are encoded once."""


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
        vae_scale_factor=factor,
        native_resolution=int(unet.get("sample_size") or 64) * factor,
        texts=tuple(_text(folder / part) for part in parts if part.startswith("text_encoder")),
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
    return site != weight and matches_target(site, suffix)


def pack_memory_bytes(
    shape: BaseShape,
    slots: Sequence[SlotShape],
    *,
    targets: Sequence[str],
    resolution: int,
    precision: Precision,
    gradient_checkpointing: bool = False,
    on_gpu: bool = False,
    text: TextTraining = CACHED_TEXT,
) -> int:
    """Predicted bytes of a worker that trains these slots together, on its device.

    On a GPU the VAE and the text encoders that no slot trains leave before training starts; on a
    CPU they stay, in fp32.
    """
    tensors = pack_tensor_bytes(
        shape,
        slots,
        targets=targets,
        resolution=resolution,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        on_gpu=on_gpu,
        text=text,
    )
    item = BYTES[precision]
    denoiser = shape.num_denoiser_parameters * item
    others = shape.num_other_parameters * (item if on_gpu else BYTES["fp32"])
    if on_gpu:
        tensors += sum(encoder.num_parameters for encoder in shape.texts) * item * bool(text)
        return PROCESS_BYTES + denoiser + max(others, tensors)
    return PROCESS_BYTES + denoiser + others + tensors


def pack_tensor_bytes(
    shape: BaseShape,
    slots: Sequence[SlotShape],
    *,
    targets: Sequence[str],
    resolution: int,
    precision: Precision,
    gradient_checkpointing: bool = False,
    on_gpu: bool = False,
    text: TextTraining = CACHED_TEXT,
) -> int:
    """Predicted bytes that a pack adds to its base: bank, optimiser and activations at the peak."""
    if not slots:
        return 0
    item = BYTES[precision]
    rank = max(slot.rank for slot in slots)  # slots are padded to the largest
    numbers = adapter_parameters(shape, targets, rank) + text.parameters(shape, rank)
    padded = -(-numbers // SLOT_BLOCK) * SLOT_BLOCK
    states = 2 * 4 * (len(slots) + 1) * padded  # master and gradient, the null adapter's too
    if not all(slot.eight_bit for slot in slots):
        states += 2 * 4 * (len(slots) + 1) * padded
    states += sum(2 * slot.eight_bit for slot in slots) * padded
    if item < BYTES["fp32"]:
        states += len(slots) * padded * item
    rows = Rows(
        count=sum(slot.num_rows for slot in slots),
        per_slot=max(slot.num_rows for slot in slots),
        side=resolution // shape.vae_scale_factor,
        item=item,
        norm_item=BYTES["fp32"] if on_gpu else item,
    )
    adapters = Adapters(lambda name: any(is_target(name, suffix) for suffix in targets), rank)
    saved = activation_bytes(shape.denoiser, rows, adapters, checkpointing=gradient_checkpointing)
    saved += text.activation_bytes(shape, rank, sum(slot.num_prompts for slot in slots), item)
    widest = shape.block_channels[0] * rows.count * rows.side**2 * item
    return states + saved + BACKWARD_WIDTHS * widest


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


def _text(folder: Path) -> TextShape:
    return TextShape(_weights(folder), _config(folder).get("hidden_act") != "gelu")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values
    except (OSError, ValueError) as error:
        do = "a base is a folder in diffusers' layout"
        raise BaseModelError(f"{path} cannot be read", str(error), do) from error
