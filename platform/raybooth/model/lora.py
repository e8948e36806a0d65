"""y = W x + s B A x: low-rank adapters of linear and convolution layers (Hu et al. 2021, LoRA).

Shapes: R rank, I inputs, O outputs, h x w kernel. A ("down") is [R, I] or [R, I, h, w], B ("up")
is [O, R] or [O, R, 1, 1]; a convolution's A keeps the site's kernel, stride and padding (PEFT).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from raybooth.errors import BaseModelError, InputError

Targets = Literal["attention", "all"] | tuple[str, ...]

PRESETS: Mapping[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "all": (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    ),
}
"""Module-name suffixes of a preset; those that a denoiser lacks are passed over."""

_PREFIXES = ("unet.", "transformer.", "base_model.model.")
_DOWN = (".lora.down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight")
_UP = (".lora.up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight")


class LoraPair(NamedTuple):
    """A and B of one site."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]


AdapterTensors = dict[str, LoraPair]
"""One subject's adapter: a pair for each site name."""


@dataclass(frozen=True)
class Site:
    """One frozen layer that an adapter may move."""

    name: str
    kind: Literal["linear", "conv"]
    in_features: int
    out_features: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def down_shape(self, rank: int) -> tuple[int, ...]:
        """[R, I] or [R, I, h, w]."""
        shape = (rank, self.in_features)
        return shape if self.kind == "linear" else (*shape, *self.kernel)

    def up_shape(self, rank: int) -> tuple[int, ...]:
        """[O, R] or [O, R, 1, 1]."""
        shape = (self.out_features, rank)
        return shape if self.kind == "linear" else (*shape, 1, 1)


def find_sites(denoiser: nn.Module, targets: Targets) -> tuple[Site, ...]:
    """The layers of `denoiser` that `targets` names, in the module's own order.

    A pattern matches a module whose dotted name ends with it. Raises InputError when a pattern
    (or a whole preset) matches nothing, or matches a layer that is neither linear nor Conv2d.
    """
    patterns = PRESETS[targets] if isinstance(targets, str) else targets
    sites: list[Site] = []
    unmatched = set(patterns)
    for name, module in denoiser.named_modules():
        matching = [p for p in patterns if name == p or name.endswith("." + p)]
        if matching:
            unmatched.difference_update(matching)
            sites.append(_site(name, module))
    if not sites or (unmatched and not isinstance(targets, str)):
        what = f"adapter target {', '.join(sorted(unmatched)) or '(none given)'} matches no layer"
        raise InputError(
            what, type(denoiser).__name__, "name module suffixes, for example `to_q` or `ff.net.2`"
        )
    return tuple(sites)


def init_pair(site: Site, rank: int, generator: torch.Generator) -> LoraPair:
    """A ~ N(0, (1/R)^2) in fp32 from `generator`, B = 0: PEFT's "gaussian", diffusers' choice."""
    down = torch.empty(site.down_shape(rank), dtype=torch.float32)
    return LoraPair(
        down.normal_(0.0, 1.0 / rank, generator=generator), torch.zeros(site.up_shape(rank))
    )


def adapter_parameters(sites: Iterable[Site], rank: int) -> int:
    """Numbers in one adapter."""
    return sum(prod(site.down_shape(rank)) + prod(site.up_shape(rank)) for site in sites)


def to_diffusers_keys(tensors: AdapterTensors, scale: float) -> dict[str, Tensor]:
    """Classic keys `unet.<site>.lora.{down,up}.weight`, fp32, `scale` folded into B, no alpha."""
    state: dict[str, Tensor] = {}
    for name, pair in tensors.items():
        down = pair.down.detach().to("cpu", torch.float32)
        up = pair.up.detach().to("cpu", torch.float32) * scale
        state[f"unet.{name}.lora.down.weight"] = down.contiguous().clone()
        state[f"unet.{name}.lora.up.weight"] = up.contiguous().clone()
    return state


def from_diffusers_keys(state: Mapping[str, Tensor]) -> AdapterTensors:
    """Pairs of a file in the classic or PEFT key form; `<site>.alpha` is folded into B as alpha/R.

    Raises BaseModelError when a key is not of the denoiser, or a pair is not whole.
    """
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in state.items():
        name = _strip_prefix(key)
        if name.startswith("text_encoder"):
            raise BaseModelError(
                "an adapter file moves the text encoder, not only the denoiser", key
            )
        if (site := _strip_suffix(name, _DOWN)) is not None:
            downs[site] = tensor
        elif (site := _strip_suffix(name, _UP)) is not None:
            ups[site] = tensor
        elif (site := _strip_suffix(name, (".lora.alpha", ".alpha"))) is not None:
            alphas[site] = float(tensor)
        else:
            raise BaseModelError(
                "an adapter file holds a tensor that is not a LoRA of the denoiser", key
            )
    for site in (*downs, *ups, *alphas):
        if site not in downs or site not in ups:
            raise BaseModelError("an adapter file lacks half of a LoRA pair", site)
    return {site: _folded(downs[site], ups[site], alphas.get(site)) for site in downs}


def save_adapter(path: Path, tensors: AdapterTensors, scale: float) -> None:
    """`path`, a safetensors file that diffusers' `load_lora_weights` reads."""
    save_file(to_diffusers_keys(tensors, scale), path, metadata={"format": "pt"})


def load_adapter(path: Path) -> AdapterTensors:
    """The pairs of a safetensors file, scale 1; BaseModelError when it is damaged or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BaseModelError(f"{path} is not a readable safetensors file", str(error)) from error
    return from_diffusers_keys(state)


def _site(name: str, module: nn.Module) -> Site:
    if isinstance(module, nn.Linear):
        return Site(name, "linear", module.in_features, module.out_features)
    if (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ):
        kernel, stride = _pair(module.kernel_size), _pair(module.stride)
        channels = module.in_channels, module.out_channels
        return Site(name, "conv", *channels, kernel, stride, _pair(module.padding))
    raise InputError(
        f"adapter target {name} is not a plain linear or convolution layer",
        type(module).__name__,
        "name the layers inside it",
    )


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width


def _strip_prefix(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _strip_suffix(name: str, suffixes: tuple[str, ...]) -> str | None:
    for suffix in suffixes:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


def _folded(down: Tensor, up: Tensor, alpha: float | None) -> LoraPair:
    if down.shape[0] != up.shape[1]:
        raise BaseModelError("a LoRA pair has two ranks", f"{down.shape[0]} and {up.shape[1]}")
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    return LoraPair(down.float(), up.float() * scale)
