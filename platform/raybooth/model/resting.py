"""Parts of a base that a train step does not need rest in the host's memory, and come back to draw.

The VAE and the text encoders encode photos and prompts once; everything after reads the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from raybooth.model.base import Base

_P = ParamSpec("_P")
_R = TypeVar("_R")


def rest(base: Base, *, text_encoders: bool = True) -> int:
    """Moves the VAE, and the text encoders unless they are trained, off the base's device.

    Returns the bytes that left it: 0 for a base on the CPU.
    """
    if base.device.type == "cpu":
        return 0
    parts = _parts(base) if text_encoders else [base.vae]
    left = sum(
        tensor.numel() * tensor.element_size()
        for part in parts
        for tensor in (*part.parameters(), *part.buffers())
        if tensor.device.type == base.device.type
    )
    for part in parts:
        part.to("cpu")
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    return left


@contextmanager
def awake(base: Base) -> Iterator[None]:
    """Every part on the base's device, for as long as the context lasts."""
    resting = [part for part in _parts(base) if not _is_on(part, base.device)]
    for part in resting:
        part.to(base.device)
    try:
        yield
    finally:
        for part in resting:
            part.to("cpu")
        if resting and base.device.type == "cuda":
            torch.cuda.empty_cache()


def wakes(function: Callable[Concatenate[Base, _P], _R]) -> Callable[Concatenate[Base, _P], _R]:
    """`function(base, ...)` with every part of the base on its device."""

    @wraps(function)
    def call(base: Base, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with awake(base):
            return function(base, *args, **kwargs)

    return call


def _parts(base: Base) -> list[nn.Module]:
    return [base.vae, *base.text_encoders.values()]


def _is_on(part: nn.Module, device: torch.device) -> bool:
    return next(part.parameters()).device.type == device.type
