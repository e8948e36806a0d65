"""AdamW of every slot on its own (Loshchilov and Hutter 2019), 8-bit states by bitsandbytes.

Shapes: S rows of the bank (0 is the null adapter), P parameters of a padded bank row,
N parameters of a slot in its own layout (its own rank, padded to a multiple of 256).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raybooth.config import OptimizerConfig
from raybooth.errors import ConfigError

MIN_8BIT_SIZE = 4096
BLOCK_SIZE = 256


def lr_at(config: OptimizerConfig, step: int, total: int) -> float:
    """Learning rate of the update after `step` updates out of `total` (diffusers' get_scheduler).

    constant: lr; linear: to 0 at `total`; cosine: half a cosine to 0; each after a linear
    warm-up from 0.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * step / max(1, warmup)
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "linear":
        return config.learning_rate * max(0.0, (total - step) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - warmup)
    return config.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass(frozen=True, slots=True)
class SlotUpdate:
    """One slot's part of an update: its learning rate and the factor on its raw gradient."""

    slot: int
    learning_rate: float
    grad_scale: float
    """Clip coefficient over loss scale."""


def clip_coefficient(grad_norm: float, max_grad_norm: float) -> float:
    """min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_."""
    return min(1.0, max_grad_norm / (grad_norm + 1e-6))


class SlotAdamW:
    """AdamW over the rows of `flat_SP`: each slot has its own step count, rates and clip.

    A slot that is not in an update does not move: neither weights, nor moments, nor count.
    """

    def __init__(self, flat_SP: Tensor) -> None:
        self._flat_SP = flat_SP
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

        `size` is the slot's own size, padded; `state` continues where another `state` left off.
        """
        if config.name == "adamw8bit" and self._flat_SP.dtype != torch.float32:
            raise ConfigError(
                "adamw8bit needs float32 masters", str(self._flat_SP.dtype), "use name: adamw"
            )
        device = self._flat_SP.device
        count = torch.tensor(float(opt_step), device=device)
        entry = _Slot(config, index_N.to(device), size, opt_step, count)
        self._slots[slot] = entry
        if entry.is_8bit:
            entry.eight = _EightBit.make(size, device)
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
        grad_P = grad_SP[slot]
        if update.grad_scale != 1.0:
            grad_P.mul_(update.grad_scale)
        torch._fused_adamw_(
            [self._flat_SP.detach()[slot]],
            [grad_P],
            [self._exp_avg_SP[slot]],
            [self._exp_avg_sq_SP[slot]],
            [],
            [entry.count],
            lr=update.learning_rate,
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
        used = entry.index_N.shape[0]
        p_N, g_N = flat_SP.new_zeros(entry.size), flat_SP.new_zeros(entry.size)
        p_N[:used] = flat_SP[update.slot, entry.index_N]
        g_N[:used] = grad_SP[update.slot, entry.index_N] * update.grad_scale
        config = entry.config
        optimizer_update_8bit_blockwise(
            "adam",
            g_N,
            p_N,
            eight.state1,
            eight.state2,
            config.betas[0],
            config.betas[1],
            0.0,
            0.0,
            config.eps,
            entry.opt_step,
            update.learning_rate,
            eight.qmap1,
            eight.qmap2,
            eight.absmax1,
            eight.absmax2,
            config.weight_decay,
        )
        flat_SP[update.slot, entry.index_N] = p_N[:used]


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
        return self.config.name == "adamw8bit" and self.size >= MIN_8BIT_SIZE


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
    def make(cls, size: int, device: torch.device) -> _EightBit:
        from bitsandbytes.functional import create_dynamic_map

        blocks = size // BLOCK_SIZE
        return cls(
            torch.zeros(size, dtype=torch.uint8, device=device),
            torch.zeros(size, dtype=torch.uint8, device=device),
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
