"""One training loop's state: weights, AdamW, averaged weights, train steps; saved whole.

Every batch is a function of (seed, train step), so the state needs no random generator, and a
resumed loop equals an uninterrupted one bit for bit.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raybooth.pocket.team import Team


@dataclass(frozen=True)
class LoopConfig:
    """AdamW with a warmup - stable - decay rate: decay now, later go on from the stable state."""

    steps: int
    decay_steps: int
    learning_rate: float = 1.2e-3
    warmup_steps: int = 60
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0
    ema: float = 0.9985
    save_every_s: float = 60.0

    def rate(self, step: int) -> float:
        """The learning rate of this train step: linear up, flat, then linear down to 2 %."""
        left = (self.steps - step) / max(1, self.decay_steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, max(0.02, left))


class Loop:
    """Modules trained together: `update` is one train step of AdamW and of the averaged weights."""

    def __init__(
        self, config: LoopConfig, modules: Sequence[nn.Module], path: Path, team: Team
    ) -> None:
        self.config, self.step, self.rows, self.loss, self.seconds = config, 0, 0, 0.0, 0.0
        self.path, self.team = path, team
        self._saved_at, self._tick = time.monotonic(), time.monotonic()
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for p in self.parameters if p.ndim > 1],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True
        )
        self._averaged = [p.detach().clone() for p in self.parameters]

    def update(self, shares: Sequence[Callable[[], Tensor]], rows: int) -> None:
        """One train step on the mean of the shares' losses; `loss` follows it as a slow average."""
        rate = self.config.rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        flat = self._gradients([shares[i] for i in self.team.mine()])
        self.team.add(flat)
        flat /= len(shares)
        start = 0
        for p in self.parameters:
            p.grad = flat[start : start + p.numel()].view_as(p)
            start += p.numel()
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self._optimizer.step()
        self.step += 1
        self.rows += rows
        decay = min(self.config.ema, (1 + self.step) / (12 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averaged, [p.detach() for p in self.parameters], 1 - decay)
        self.loss += (float(flat[-1]) - self.loss) / min(self.step, 200)
        now = time.monotonic()
        self.seconds, self._tick = self.seconds + now - self._tick, now
        if self.step == self.config.steps - self.config.decay_steps:
            self.save(self.path.with_name(self.path.stem + ".stable.pt"))
        if self.step == self.config.steps or now - self._saved_at > self.config.save_every_s:
            self.save()
            self._saved_at = now

    def _gradients(self, shares: Sequence[Callable[[], Tensor]]) -> Tensor:
        """The shares' gradients and, last, their losses: summed and flat."""
        total: Tensor | None = None
        for share in shares:
            loss = share()
            grads = torch.autograd.grad(loss, self.parameters)
            flat = torch.cat([*(grad.reshape(-1) for grad in grads), loss.detach().reshape(1)])
            total = flat if total is None else total + flat
        assert total is not None, "every process has at least one share"
        return total

    def swap(self) -> None:
        """Exchanges the trained and the averaged weights; twice is nothing."""
        with torch.no_grad():
            for p, averaged in zip(self.parameters, self._averaged, strict=True):
                kept = p.detach().clone()
                p.copy_(averaged)
                averaged.copy_(kept)

    def save(self, path: Path | None = None) -> None:
        """Writes the state beside, syncs, renames: a killed process leaves the last whole state."""
        if not self.team.leads:
            return
        target = path or self.path
        target.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "weights": [p.detach() for p in self.parameters],
            "averaged": self._averaged,
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "rows": self.rows,
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
        self.step, self.rows, self.loss, self.seconds = (
            state[key] for key in ("step", "rows", "loss", "seconds")
        )
        return True


def numbers(seed: int, stage: str, step: int) -> torch.Generator:
    """The random numbers of one train step: a function of (seed, stage, step) alone."""
    mixed = int.from_bytes(stage.encode()[:3], "big")
    return torch.Generator().manual_seed((seed * 1_000_003 + mixed * 7_919 + step) % 2**63)
