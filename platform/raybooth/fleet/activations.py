"""Bytes that a U-Net keeps for backward, block by block, from the shapes of its weights alone.

One tensor at a time, as autograd of torch 2.11 saves them: a convolution keeps its input, a
normalisation its input, SiLU its input, attention q, k, v and its output, an adapter A x. A CUDA
autocast runs normalisations in fp32 and casts what leaves them; a CPU keeps the low precision.
Held against counted bytes by tests/raybooth/fleet/test_memory.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

TEXT_TOKENS = 77
Dims = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """What runs through the denoiser in one train step."""

    count: int
    per_slot: int
    """Rows of one adapter; from two on, a convolution's adapter is copied for each row."""

    side: int
    """Latent pixels of a side."""

    item: int
    """Bytes of a number of the denoiser: 4, or 2 in bf16 and fp16."""

    norm_item: int
    """Bytes of a number in a normalisation: `item`, or 4 under a CUDA autocast."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """Which layers are trained by low rank; every layer in full if `rank` is 0."""

    is_target: Callable[[str], bool]
    rank: int

    @property
    def in_full(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True, slots=True)
class _Block:
    """A block that gradient checkpointing drops and runs again, or a lone layer that it keeps."""

    level: int
    """How often the side was halved before it."""

    inside: int
    """Bytes saved in it."""

    boundary: int
    """Bytes of its input, all that checkpointing keeps; 0 for a layer that it does not wrap."""

    trains: bool


def activation_bytes(
    weights: Mapping[str, Dims], rows: Rows, adapters: Adapters, *, checkpointing: bool
) -> int:
    """Bytes alive when backward starts (or, checkpointed, while it runs the largest block again).

    Blocks before the first trained layer keep nothing: no gradient reaches them.
    """
    blocks = list(_blocks(weights, rows, adapters))
    first = next((place for place, block in enumerate(blocks) if block.trains), len(blocks))
    blocks = blocks[first:]
    if not checkpointing:
        return sum(block.inside for block in blocks)
    kept = sum(block.boundary or block.inside for block in blocks)
    return kept + max((block.inside for block in blocks if block.boundary), default=0)


def _blocks(weights: Mapping[str, Dims], rows: Rows, adapters: Adapters) -> Iterator[_Block]:
    modules = _by_block(weights)
    depth = 1 + max((int(m[1]) for name in modules if (m := _DOWN.match(name))), default=0)
    for name in sorted(modules, key=_order):
        layer = _Layers(name, modules[name], rows, adapters, _level(name, depth))
        yield layer.block()


@dataclass(frozen=True, slots=True)
class _Layers:
    """One block's weights, by their names inside it."""

    name: str
    shapes: Mapping[str, Dims]
    rows: Rows
    adapters: Adapters
    level: int

    def block(self) -> _Block:
        trains = self.adapters.in_full or any(self._adapted(layer) for layer in self.shapes)
        if ".resnets." in self.name:
            inside, boundary = self._resnet()
        elif ".transformer_blocks." in self.name:
            inside, boundary = self._transformer()
        elif ".attentions." in self.name:
            inside, boundary = self._wrapper(), 0
        elif "samplers." in self.name:
            inside, boundary = self._sampler(), 0
        else:
            inside, boundary = self._ends(), 0
        return _Block(self.level, inside, boundary, trains)

    def _resnet(self) -> tuple[int, int]:
        """norm1, SiLU, conv1, norm2, SiLU, conv2; a shortcut shares norm1's input."""
        rows, pixels = self.rows, self._pixels()
        cout, cin = self.shapes["conv1"][:2]
        inside = (cin + cout) * pixels * (2 * rows.norm_item + rows.item)
        return inside + self._adapter_bytes(pixels), cin * pixels * rows.item

    def _transformer(self) -> tuple[int, int]:
        """Self-attention, cross-attention, gated feed-forward, each after a LayerNorm."""
        rows, tokens = self.rows, self._pixels()
        width = self.shapes["attn1.to_q"][0]
        text = rows.count * TEXT_TOKENS
        linear = 4 + 1 + 1 + 1 + 8 + 4  # q k v o, then q, o, norm's rest, GEGLU in and gate
        low = (linear - 1) * width
        for layer, inputs in (("attn1.to_q", 1), ("attn2.to_q", 1), ("ff.net.0.proj", 1)):
            low += self._keeps_input(layer) * inputs * width
        low += self._keeps_input("ff.net.2") * 4 * width
        if rows.norm_item != rows.item:  # each adapter casts the fp32 norm's output for itself
            low += sum(self._adapted(f"attn1.{name}") for name in ("to_k", "to_v")) * width
        inside = tokens * (low * rows.item + 3 * width * rows.norm_item)
        inside += text * 2 * width * rows.item
        return inside + self._adapter_bytes(tokens), width * tokens * rows.item

    def _wrapper(self) -> int:
        """GroupNorm, proj_in, (blocks), proj_out."""
        rows, pixels = self.rows, self._pixels()
        channels = self.shapes["proj_in"][1]
        inside = channels * pixels * rows.norm_item
        for layer in ("proj_in", "proj_out"):
            kept = len(self.shapes[layer]) > 2 or self._keeps_input(layer)
            inside += kept * channels * pixels * rows.item
        return inside + self._adapter_bytes(pixels)

    def _sampler(self) -> int:
        """A convolution that halves the side, or one after the side was doubled."""
        pixels = self._pixels() * (4 if "upsamplers" in self.name else 1)
        channels = self.shapes["conv"][1]
        stride = 1 if "upsamplers" in self.name else 2
        return channels * pixels * self.rows.item + self._adapter_bytes(pixels, stride)

    def _ends(self) -> int:
        """conv_in keeps the latents, the end its norm, SiLU and convolution."""
        channels = self.shapes.get("conv_out", (0, 0))[1]
        return channels * self._pixels() * (2 * self.rows.norm_item + self.rows.item)

    def _adapter_bytes(self, pixels: int, stride: int = 1) -> int:
        """A x of each adapted layer; a convolution's with all taps, and its weights by row."""
        rows, rank = self.rows, self.adapters.rank
        total: int = 0
        for layer, dims in self.shapes.items():
            if self.adapters.in_full or not self._adapted(layer):
                continue
            taps = math.prod(dims[2:])
            size = rows.count * TEXT_TOKENS if layer in _OF_TEXT else pixels
            total += rank * size * (taps if stride == 1 else 1) // (stride * stride) * rows.item
            if len(dims) > 2 and rows.per_slot > 1:
                total += rows.count * rank * (taps * dims[1] + dims[0]) * rows.item
            if len(dims) > 2 and rows.norm_item != rows.item:
                total += dims[1] * pixels * rows.item  # its own cast of SiLU's output
        return total

    def _keeps_input(self, layer: str) -> bool:
        return self.adapters.in_full or self._adapted(layer)

    def _adapted(self, layer: str) -> bool:
        whole = f"{self.name}.{layer}" if self.name != _ENDS else layer
        return not self.adapters.in_full and self.adapters.is_target(f"{whole}.weight")

    def _pixels(self) -> int:
        """Of all rows at this level."""
        return self.rows.count * math.ceil(self.rows.side / (1 << self.level)) ** 2


_OF_TEXT = ("attn2.to_k", "attn2.to_v")
_ENDS = "ends"
_DOWN = re.compile(r"down_blocks\.(\d+)\.")
_BLOCK = re.compile(
    r"((?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\."
    r"(?:resnets\.\d+|attentions\.\d+(?:\.transformer_blocks\.\d+)?|(?:down|up)samplers\.\d+))\."
    r"(.+)\.weight"
)


def _by_block(weights: Mapping[str, Dims]) -> dict[str, dict[str, Dims]]:
    """Layers with two dimensions or more, by the block that they are in."""
    blocks: dict[str, dict[str, Dims]] = {_ENDS: {}}
    for name, dims in weights.items():
        if len(dims) < 2:
            continue
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault(match[1], {})[match[2]] = dims
        elif name in ("conv_in.weight", "conv_out.weight"):
            blocks[_ENDS][name.removesuffix(".weight")] = dims
    return {name: layers for name, layers in blocks.items() if layers}


def _level(name: str, depth: int) -> int:
    place = re.match(r"(down|up)_blocks\.(\d+)|mid", name)
    if place is None:
        return 0
    if place[1] is None:
        return depth - 1
    return int(place[2]) if place[1] == "down" else depth - 1 - int(place[2])


def _order(name: str) -> tuple[int, ...]:
    """The order in which a U-Net runs: down, mid, up, end; resnet 0, attention 0, resnet 1, ..."""
    if name == _ENDS:
        return (3,)
    parts = name.split(".")
    house = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}[parts[0]]
    numbers = [int(part) for part in parts if part.isdigit()]
    kind = parts[-2] if parts[-2] != "transformer_blocks" else "attentions"
    block = 0 if house == 1 else numbers.pop(0)
    return (house, block, "samplers" in kind, numbers[0], kind == "attentions", *numbers[1:])
