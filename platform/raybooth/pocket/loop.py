"""One training loop's state: weights, AdamW, averaged weights, step count; saved whole, resumed bit for bit.

Every batch is a function of (seed, train step), so the state needs no random generator of its own.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoopConfig:
    """AdamW with a warmup - stable - decay learning rate: it can stop, decay and later go on from the stable state."""

    steps: int
    decay_steps: int
    learning_rate: float = 1.2e-3
    warmup_steps: int = 60
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0
    ema: float = 0.9985
    save_every: int = 500

    def rate(self, step: int) -> float:
        """The learning rate of this train step: linear up, flat, then linear down to 2 %."""
        left = (self.steps - step) / max(1, self.decay_steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, max(0.02, left))


class Loop:
    """Modules trained together: `update(loss)` is one train step of the optimiser and of the averaged weights."""

    def __init__(self, config: LoopConfig, modules: Sequence[nn.Module], path: Path) -> None:
        self.config, self.step, self.loss, self.seconds = config, 0, 0.0, 0.0
        self.path = path
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)
        self._averaged = [p.detach().clone() for p in self.parameters]

    def update(self, loss: Tensor) -> None:
        """One train step; `self.loss` follows the loss as a slow average."""
        rate = self.config.rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self._optimizer.step()
        self.step += 1
        decay = min(self.config.ema, (1 + self.step) / (12 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averaged, [p.detach() for p in self.parameters], 1 - decay)
        self.loss += (loss.item() - self.loss) / min(self.step, 200)

    def swap(self) -> None:
        """Exchanges the trained and the averaged weights; twice is nothing."""
        with torch.no_grad():
            for p, averaged in zip(self.parameters, self._averaged, strict=True):
                kept = p.detach().clone()
                p.copy_(averaged)
                averaged.copy_(kept)

    def save(self, path: Path | None = None) -> None:
        """Writes the state beside, syncs, renames: a killed process leaves the last whole state."""
        target = path or self.path
        target.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "weights": [p.detach() for p in self.parameters],
            "averaged": self._averaged,
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "loss": self.loss,
            "seconds": self.seconds,
        }
        beside = target.with_suffix(".partial")
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)

    def restore(self) -> bool:
        """Goes on from the saved state; False if there is none."""
        if not self.path.exists():
            return False
        state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for p, saved, averaged, kept in zip(
                self.parameters, state["weights"], self._averaged, state["averaged"], strict=True
            ):
                p.copy_(saved)
                averaged.copy_(kept)
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.loss, self.seconds = state["step"], state["loss"], state["seconds"]
        return True


def numbers(seed: int, stage: str, step: int) -> torch.Generator:
    """The random numbers of one train step: a function of (seed, stage, step) alone."""
    mixed = int.from_bytes(stage.encode()[:3], "big")
    return torch.Generator().manual_seed((seed * 1_000_003 + mixed * 7_919 + step) % 2**63)
