"""AdamW of every slot on its own (Loshchilov and Hutter 2019), 8-bit states by bitsandbytes.

Shapes: S rows of the bank (0 is the null adapter), P parameters of a padded bank row,
N parameters of a slot in its own layout (its own rank, padded to a multiple of 256).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raybooth.config import OptimizerConfig
from raybooth.errors import ConfigError

MIN_8BIT_SIZE = 4096
BLOCK_SIZE = 256


def lr_at(config: OptimizerConfig, step: int, total: int, peak: float | None = None) -> float:
    """Learning rate of the update after `step` updates out of `total` (diffusers' get_scheduler).

    constant: lr; linear: to 0 at `total`; cosine: half a cosine to 0; each after a linear
    warm-up from 0. `peak` is another lr on the same curve.
    """
    warmup, rate = config.warmup_steps, config.learning_rate if peak is None else peak
    if step < warmup:
        return rate * step / max(1, warmup)
    if config.schedule == "constant":
        return rate
    if config.schedule == "linear":
        return rate * max(0.0, (total - step) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - warmup)
    return rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def blocks(size: int) -> int:
    """`size`, padded to whole 8-bit blocks."""
    return -(-size // BLOCK_SIZE) * BLOCK_SIZE


def eight_bit_zeros(shape: Sequence[int], device: torch.device, *, paged: bool) -> Tensor:
    """Quantised moments; `paged` ones lie where CUDA can move them to the host."""
    if not paged:
        return torch.zeros(*shape, dtype=torch.uint8, device=device)
    from bitsandbytes import functional

    moments: Tensor = functional.get_paged(*shape, dtype=torch.uint8, device=device)
    functional.fill(moments, 0)
    return moments


@dataclass(frozen=True, slots=True)
class SlotUpdate:
    """One slot's part of an update: its learning rate and the factor on its raw gradient."""

    slot: int
    learning_rate: float
    grad_scale: float
    """Clip coefficient over loss scale."""
    text_learning_rate: float | None = None
    """Of text sites and learned tokens; None: the same."""


def clip_coefficient(grad_norm: float, max_grad_norm: float) -> float:
    """min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_."""
    return min(1.0, max_grad_norm / (grad_norm + 1e-6))


class SlotAdamW:
    """AdamW over the rows of `flat_SP`: each slot has its own step count, rates and clip.

    A slot that is not in an update does not move: neither weights, nor moments, nor count.
    """

    def __init__(self, flat_SP: Tensor, text_start: int | None = None) -> None:
        """`text_start`: the column at which the denoiser's numbers end; None: they are all."""
        self._flat_SP = flat_SP
        self._text_start = flat_SP.shape[1] if text_start is None else text_start
        self._slots: dict[int, _Slot] = {}
        self._exp_avg_SP: Tensor | None = None
        self._exp_avg_sq_SP: Tensor | None = None

    def join(
        self,
        slot: int,
        config: OptimizerConfig,
        index_N: Tensor,
        size: int,
        state: dict[str, Tensor] | None = None,
        opt_step: int = 0,
    ) -> None:
        """Train row `slot` from now on; `index_N` says where its own parameters lie in the row.

        `size` is the slot's own size, the denoiser's part and the words' each padded to whole
        blocks; `state` continues where another `state` left off.
        """
        device = self._flat_SP.device
        if config.name != "adamw" and self._flat_SP.dtype != torch.float32:
            what = f"{config.name} needs float32 masters"
            raise ConfigError(what, str(self._flat_SP.dtype), "use name: adamw")
        if config.name == "paged_adamw8bit" and device.type != "cuda":
            what = "paged_adamw8bit needs CUDA's unified memory"
            raise ConfigError(what, f"device {device}", "use name: adamw8bit")
        count = torch.tensor(float(opt_step), device=device)
        entry = _Slot(config, index_N.to(device), size, opt_step, count)
        self._slots[slot] = entry
        if entry.is_8bit:
            entry.eight = _EightBit.make(size, device, paged=config.name == "paged_adamw8bit")
            if state is not None:
                entry.eight.load(state)
            return
        if self._exp_avg_SP is None or self._exp_avg_sq_SP is None:
            self._exp_avg_SP = torch.zeros_like(self._flat_SP, requires_grad=False)
            self._exp_avg_sq_SP = torch.zeros_like(self._flat_SP, requires_grad=False)
        for moments_SP, name in (
            (self._exp_avg_SP, "exp_avg"),
            (self._exp_avg_sq_SP, "exp_avg_sq"),
        ):
            moments_SP[slot] = 0
            if state is not None:
                moments_SP[slot, entry.index_N] = state[name].to(moments_SP)

    def opt_step(self, slot: int) -> int:
        """Updates that the slot has had."""
        return self._slots[slot].opt_step

    def state(self, slot: int) -> dict[str, Tensor]:
        """The slot's moments in its own layout, copied to the CPU."""
        entry = self._slots[slot]
        if entry.eight is not None:
            return entry.eight.state()
        assert self._exp_avg_SP is not None
        assert self._exp_avg_sq_SP is not None
        return {
            "exp_avg": self._exp_avg_SP[slot, entry.index_N].cpu(),
            "exp_avg_sq": self._exp_avg_sq_SP[slot, entry.index_N].cpu(),
        }

    @torch.no_grad()
    def step(self, grad_SP: Tensor, updates: list[SlotUpdate]) -> None:
        """Apply `updates`; rows of `grad_SP` are scaled in place."""
        for update in updates:
            entry = self._slots[update.slot]
            entry.opt_step += 1
            entry.count.add_(1.0)
            if entry.eight is None:
                self._step_row(grad_SP, update)
            else:
                self._step_8bit(grad_SP, update)

    def _step_row(self, grad_SP: Tensor, update: SlotUpdate) -> None:
        """torch's fused AdamW over one row: one pass over memory, no temporaries.

        Vectorising over rows as well needs a dozen passes, ten times as slow on a CPU.
        """
        entry = self._slots[update.slot]
        assert self._exp_avg_SP is not None
        assert self._exp_avg_sq_SP is not None
        config, slot = entry.config, update.slot
        if update.grad_scale != 1.0:
            grad_SP[slot].mul_(update.grad_scale)
        for span, rate in _spans(update, self._text_start, grad_SP.shape[1]):
            torch._fused_adamw_(
                [self._flat_SP.detach()[slot, span]],
                [grad_SP[slot, span]],
                [self._exp_avg_SP[slot, span]],
                [self._exp_avg_sq_SP[slot, span]],
                [],
                [entry.count],
                lr=rate,
                beta1=config.betas[0],
                beta2=config.betas[1],
                weight_decay=config.weight_decay,
                eps=config.eps,
                amsgrad=False,
                maximize=False,
            )

    def _step_8bit(self, grad_SP: Tensor, update: SlotUpdate) -> None:
        """bitsandbytes' blockwise update in the slot's own layout, so blocks never mix slots."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        entry = self._slots[update.slot]
        eight = entry.eight
        assert eight is not None
        flat_SP = self._flat_SP.detach()
        text_start = int((entry.index_N < self._text_start).sum())
        place_N = torch.arange(len(entry.index_N), device=flat_SP.device)
        place_N[text_start:] += blocks(text_start) - text_start
        p_N, g_N = flat_SP.new_zeros(entry.size), flat_SP.new_zeros(entry.size)
        p_N[place_N] = flat_SP[update.slot, entry.index_N]
        g_N[place_N] = grad_SP[update.slot, entry.index_N] * update.grad_scale
        config = entry.config
        for span, rate in _spans(update, blocks(text_start), entry.size):
            of_blocks = slice(span.start // BLOCK_SIZE, span.stop // BLOCK_SIZE)
            optimizer_update_8bit_blockwise(
                "adam",
                g_N[span],
                p_N[span],
                eight.state1[span],
                eight.state2[span],
                config.betas[0],
                config.betas[1],
                0.0,
                0.0,
                config.eps,
                entry.opt_step,
                rate,
                eight.qmap1,
                eight.qmap2,
                eight.absmax1[of_blocks],
                eight.absmax2[of_blocks],
                config.weight_decay,
            )
        flat_SP[update.slot, entry.index_N] = p_N[place_N]


def _spans(update: SlotUpdate, text_start: int, size: int) -> list[tuple[slice, float]]:
    """The parts of a slot's parameters that have a learning rate of their own."""
    rate, text_rate = update.learning_rate, update.text_learning_rate
    if text_rate is None or text_rate == rate:
        return [(slice(0, size), rate)]
    return [(slice(0, text_start), rate), (slice(text_start, size), text_rate)]


@dataclass(slots=True)
class _Slot:
    config: OptimizerConfig
    index_N: Tensor
    size: int
    opt_step: int
    count: Tensor
    """`opt_step` on the device, as the fused kernel wants it."""
    eight: _EightBit | None = None

    @property
    def is_8bit(self) -> bool:
        """Decided by the slot's own size, whoever shares its bank."""
        return self.config.name != "adamw" and self.size >= MIN_8BIT_SIZE


@dataclass(slots=True)
class _EightBit:
    """Quantised moments of one slot, block by block of 256."""

    state1: Tensor
    state2: Tensor
    absmax1: Tensor
    absmax2: Tensor
    qmap1: Tensor
    qmap2: Tensor

    @classmethod
    def make(cls, size: int, device: torch.device, *, paged: bool) -> _EightBit:
        from bitsandbytes.functional import create_dynamic_map

        blocks = size // BLOCK_SIZE
        return cls(
            eight_bit_zeros((size,), device, paged=paged),
            eight_bit_zeros((size,), device, paged=paged),
            torch.zeros(blocks, device=device),
            torch.zeros(blocks, device=device),
            create_dynamic_map(signed=True).to(device),
            create_dynamic_map(signed=False).to(device),
        )

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).cpu().clone() for name in _EIGHT_BIT_NAMES}

    def load(self, state: dict[str, Tensor]) -> None:
        for name in _EIGHT_BIT_NAMES:
            getattr(self, name).copy_(state[name])


_EIGHT_BIT_NAMES = ("state1", "state2", "absmax1", "absmax2")
