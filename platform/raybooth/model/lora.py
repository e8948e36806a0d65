"""y = W x + s B A x: low-rank adapters of linear and convolution layers (Hu et al. 2021, LoRA).

Shapes: R rank, I inputs, O outputs, h x w kernel. A ("down") is [R, I] or [R, I, h, w], B ("up")
is [O, R] or [O, R, 1, 1]; a convolution's A keeps the site's kernel, stride and padding (PEFT).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raybooth.config.adapter import Targets, matches_target
from raybooth.errors import BaseModelError, InputError
from raybooth.model.targets import PRESETS as PRESETS
from raybooth.model.targets import TEXT_PRESETS
from raybooth.model.tensor_file import read_tensors

DENOISER = "unet"
"""The part of a base that every adapter moves; the others are its text encoders' folders."""

CLASSIC = "text_model."
"""Names in a text encoder start with it; transformers 5.6 dropped it from one of two classes."""

_PREFIXES = ("unet.", "transformer.", "base_model.model.")
_TEXT = re.compile(r"(?:base_model\.model\.)?(text_encoder(?:_\d+)?)\.(.+)")
_LORA_DOWN = (".lora.down", ".lora_linear_layer.down", ".lora_A", ".lora_A.default", ".lora_down")
_LORA_UP = (".lora.up", ".lora_linear_layer.up", ".lora_B", ".lora_B.default", ".lora_up")
_DOWN = tuple(name + ".weight" for name in _LORA_DOWN)
_UP = tuple(name + ".weight" for name in _LORA_UP)
_ALPHA = (".lora.alpha", ".lora_linear_layer.alpha", ".alpha")


class LoraPair(NamedTuple):
    """A and B of one site."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]


AdapterTensors = dict[str, LoraPair]
"""One subject's adapter: a pair for each site's key."""


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
    part: str = DENOISER

    @property
    def key(self) -> str:
        """The site in an adapter: its name, after its text encoder's folder if it lies in one."""
        return self.name if self.part == DENOISER else f"{self.part}.{self.name}"

    def down_shape(self, rank: int) -> tuple[int, ...]:
        """[R, I] or [R, I, h, w]."""
        shape = (rank, self.in_features)
        return shape if self.kind == "linear" else (*shape, *self.kernel)

    def up_shape(self, rank: int) -> tuple[int, ...]:
        """[O, R] or [O, R, 1, 1]."""
        shape = (self.out_features, rank)
        return shape if self.kind == "linear" else (*shape, 1, 1)


@dataclass(frozen=True)
class TokenSite:
    """The embedding table of one text encoder, to which an adapter adds learned rows."""

    part: str
    num_tokens: int
    width: int
    first_id: int
    """Id of the first learned token: those that the tokenizer knows end there."""


def find_sites(denoiser: nn.Module, targets: Targets) -> tuple[Site, ...]:
    """The layers of `denoiser` that `targets` names, in the module's own order.

    A pattern matches a module whose dotted name ends with it; one with a `*` takes the linear
    and convolution layers among its matches. Raises InputError when a pattern (or a whole preset)
    matches nothing, or names a layer that is neither linear nor Conv2d.
    """
    names = dict(denoiser.named_modules())
    sites = _find(names, PRESETS[targets] if isinstance(targets, str) else targets, DENOISER)
    _check_found(sites, targets, type(denoiser).__name__, "`to_q` or `ff.net.2`")
    return tuple(sites)


def find_text_sites(text_encoders: Mapping[str, nn.Module], targets: Targets) -> tuple[Site, ...]:
    """The layers of the text encoders that `targets` names, encoder by encoder.

    Their names are in the classic form, `text_model....`, whatever transformers calls them.
    Raises InputError as `find_sites`.
    """
    patterns = TEXT_PRESETS[targets] if isinstance(targets, str) else targets
    sites: list[Site] = []
    for part, encoder in text_encoders.items():
        prefix = "" if hasattr(encoder, "text_model") else CLASSIC
        names = {prefix + name: module for name, module in encoder.named_modules() if name}
        sites.extend(_find(names, patterns, part))
    _check_found(sites, targets, ", ".join(text_encoders), "`q_proj` or `mlp.fc1`")
    return tuple(sites)


def site_module(module: nn.Module, site: Site) -> nn.Module:
    """The layer of `module` that `site` means."""
    if site.part != DENOISER and not hasattr(module, "text_model"):
        return module.get_submodule(site.name.removeprefix(CLASSIC))
    return module.get_submodule(site.name)


def denoiser_part(tensors: AdapterTensors) -> AdapterTensors:
    """The pairs of the denoiser alone."""
    return {key: pair for key, pair in tensors.items() if not _TEXT.fullmatch(key)}


def text_part(tensors: AdapterTensors) -> AdapterTensors:
    """The pairs of the text encoders alone."""
    return {key: pair for key, pair in tensors.items() if _TEXT.fullmatch(key)}


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
    """Classic keys, fp32, `scale` folded into B, no alpha.

    `unet.<site>.lora.{down,up}.weight` and, for a text encoder,
    `text_encoder.text_model.<site>.lora_linear_layer.{down,up}.weight`.
    """
    state: dict[str, Tensor] = {}
    for key, pair in tensors.items():
        stem = f"{key}.lora_linear_layer" if _TEXT.fullmatch(key) else f"unet.{key}.lora"
        down = pair.down.detach().to("cpu", torch.float32)
        up = pair.up.detach().to("cpu", torch.float32) * scale
        state[f"{stem}.down.weight"] = down.contiguous().clone()
        state[f"{stem}.up.weight"] = up.contiguous().clone()
    return state


def from_diffusers_keys(state: Mapping[str, Tensor]) -> AdapterTensors:
    """Pairs of a file in the classic or PEFT key form; `<site>.alpha` is folded into B as alpha/R.

    Text encoders may be named with or without `text_model.`. Raises BaseModelError when a key is
    of neither denoiser nor text encoder, or a pair is not whole.
    """
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in state.items():
        name = _plain(key)
        if (site := _strip_suffix(name, _DOWN)) is not None:
            downs[site] = tensor
        elif (site := _strip_suffix(name, _UP)) is not None:
            ups[site] = tensor
        elif (site := _strip_suffix(name, _ALPHA)) is not None:
            alphas[site] = float(tensor)
        else:
            what = "an adapter file holds a tensor that is not a LoRA of the denoiser"
            raise BaseModelError(f"{what} or a text encoder", key)
    for site in (*downs, *ups, *alphas):
        if site not in downs or site not in ups:
            raise BaseModelError("an adapter file lacks half of a LoRA pair", site)
    return {site: _folded(downs[site], ups[site], alphas.get(site)) for site in downs}


def save_adapter(path: Path, tensors: AdapterTensors, scale: float) -> None:
    """`path`, a safetensors file that diffusers' `load_lora_weights` reads."""
    save_file(to_diffusers_keys(tensors, scale), path, metadata={"format": "pt"})


def load_adapter(path: Path) -> AdapterTensors:
    """The pairs of a safetensors file, scale 1; BaseModelError when it is damaged or foreign."""
    return from_diffusers_keys(read_tensors(path).tensors)


def _find(names: Mapping[str, nn.Module], patterns: Iterable[str], part: str) -> list[Site]:
    """Sites by pattern; a pattern without `*` must not name anything but a plain layer."""
    sites: list[Site] = []
    for name, module in names.items():
        matching = [pattern for pattern in patterns if matches_target(name, pattern)]
        site = _site(name, module, part) if matching else None
        if site is not None:
            sites.append(site)
        elif any("*" not in pattern for pattern in matching):
            raise InputError(
                f"adapter target {name} is not a plain linear or convolution layer",
                type(module).__name__,
                "name the layers inside it",
            )
    return sites


def _check_found(sites: Sequence[Site], targets: Targets, where: str, example: str) -> None:
    named: tuple[str, ...] = () if isinstance(targets, str) else targets
    unmatched = [t for t in named if not any(matches_target(site.name, t) for site in sites)]
    if unmatched or not sites:
        what = f"adapter target {', '.join(unmatched) or '(none given)'} matches no layer"
        do = f"name module suffixes, for example {example}"
        raise InputError(what, where, do)


def _site(name: str, module: nn.Module, part: str) -> Site | None:
    if isinstance(module, nn.Linear):
        return Site(name, "linear", module.in_features, module.out_features, part=part)
    if (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ):
        kernel, stride = _pair(module.kernel_size), _pair(module.stride)
        channels = module.in_channels, module.out_channels
        return Site(name, "conv", *channels, kernel, stride, _pair(module.padding), part)
    return None


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width


def _plain(key: str) -> str:
    """A file's key as an adapter's: no prefix for the denoiser, the classic name in an encoder."""
    if match := _TEXT.fullmatch(key):
        return f"{match[1]}.{CLASSIC}{match[2].removeprefix(CLASSIC)}"
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
