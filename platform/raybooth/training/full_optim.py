"""AdamW over whole tensors, its states in 32 or in 8 bits, for full runs under DeepSpeed.

DeepSpeed hands the optimiser its own flat pieces of the weights, so a state is a dict of plain
tensors that a checkpoint can hold and any worker can load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from raybooth.config import OptimizerConfig
from raybooth.training.optim import BLOCK_SIZE, MIN_8BIT_SIZE, eight_bit_zeros


def make_optimizer(parameters: Sequence[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of `config` over a list of float32 parameters."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(list(parameters), fused=True, **settings)
    return AdamW8bit(list(parameters), paged=config.name == "paged_adamw8bit", **settings)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with blockwise 8-bit moments (Dettmers et al. 2022); small tensors keep 32 bits.

    bitsandbytes' own kernels, called as the slots of a pack call them. `paged` moments lie in
    memory that CUDA moves to the host when the device is full.
    """

    def __init__(self, parameters: Sequence[Tensor], *, paged: bool, **settings: Any) -> None:
        super().__init__(parameters, settings)
        self._paged = paged

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            self._start(parameter, state)
        state["step"] += 1
        update = _update_32bit if "exp_avg" in state else _update_8bit
        update(parameter, state, group)

    def _start(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        state["step"] = torch.zeros((), device=parameter.device)
        if parameter.numel() < MIN_8BIT_SIZE:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            return
        blocks = -(-parameter.numel() // BLOCK_SIZE)
        for number in ("1", "2"):
            state[f"state{number}"] = eight_bit_zeros(
                parameter.shape, parameter.device, paged=self._paged
            )
            state[f"absmax{number}"] = torch.zeros(blocks, device=parameter.device)


def _update_32bit(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    assert parameter.grad is not None
    torch._fused_adamw_(
        [parameter],
        [parameter.grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def _update_8bit(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    optimizer_update_8bit_blockwise(
        "adam",
        parameter.grad,
        parameter,
        state["state1"],
        state["state2"],
        *group["betas"],
        0.0,
        0.0,
        group["eps"],
        int(state["step"]),
        group["lr"],
        *_quantile_maps(parameter.device),
        state["absmax1"],
        state["absmax2"],
        group["weight_decay"],
    )


@cache
def _quantile_maps(device: torch.device) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import create_dynamic_map

    signed, unsigned = (create_dynamic_map(signed=signed).to(device) for signed in (True, False))
    return signed, unsigned
