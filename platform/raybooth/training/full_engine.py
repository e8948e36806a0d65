"""The one place that touches DeepSpeed: an engine of any ZeRO stage behind four verbs.

Weights and masters are float32 throughout; bf16 is autocast. The optimiser's states are read and
written as plain tensors, so that a checkpoint needs no pickle and no DeepSpeed format.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raybooth.config import TrainConfig
from raybooth.errors import ConfigError
from raybooth.training.checkpoint import snapshot
from raybooth.training.full_matrix import BUCKET_NUMBERS, Cell, cell_of, reason_against
from raybooth.training.full_optim import make_optimizer


class FullEngine:
    """A module and its optimiser, shared out over the default process group."""

    def __init__(self, module: nn.Module, train: TrainConfig, device: torch.device) -> None:
        """Raises ConfigError when the combination is not supported on this device."""
        cell = cell_of(train)
        if reason := reason_against(cell, "cuda" if device.type == "cuda" else "cpu"):
            raise ConfigError("this full run cannot be trained", str(cell), reason)
        deepspeed = _deepspeed()
        self.module: Any = module
        self._stage = cell.zero_stage
        self._max_norm = train.optimizer.max_grad_norm
        self._parameters = list(module.parameters())
        self._optimizer = make_optimizer(self._parameters, train.optimizer)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=module,
            optimizer=self._optimizer,
            config=_settings(cell, train, sum(weight.numel() for weight in self._parameters)),
            dist_init_required=False,
        )

    def __call__(self, *inputs: Any) -> Tensor:
        """The module's forward."""
        out: Tensor = self._engine(*inputs)
        return out

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulate gradients; with the last part they are averaged over the workers."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        """Clip the whole gradient, update, clear; returns the norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = 0.0
        if self._stage == 0:
            norm = float(nn.utils.clip_grad_norm_(self._parameters, self._max_norm))
        self._engine.step()
        return norm if self._stage == 0 else float(self._engine.get_global_grad_norm())

    def gather(self, part: nn.Module) -> dict[str, Tensor]:
        """The part's whole state on the CPU, copied; every worker must call it."""
        if self._stage < 3:
            return {name: snapshot(value) for name, value in part.state_dict().items()}
        gathered = _deepspeed().zero.GatheredParameters
        state = {}
        for name, value in part.state_dict(keep_vars=True).items():
            with gathered([value] if isinstance(value, nn.Parameter) else []):
                state[name] = snapshot(value)
        return state

    def optimizer_state(self) -> list[dict[str, Tensor]]:
        """Moments of each piece that this worker updates, copied to the CPU."""
        return [
            {name: snapshot(value) for name, value in self._optimizer.state[piece].items()}
            for piece in self._pieces()
        ]

    def load_optimizer(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from `optimizer_state`."""
        for piece, state in zip(self._pieces(), states, strict=True):
            self._optimizer.state[piece] = {
                name: value.clone().to(piece.device) for name, value in state.items()
            }

    def close(self) -> None:
        """Take DeepSpeed's hooks off and free what it holds."""
        self._engine.destroy()

    def _pieces(self) -> list[Tensor]:
        """What the optimiser updates: parameters, or this worker's flat pieces of them."""
        if self._stage == 0:
            return list(self._parameters)
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)


def _settings(cell: Cell, train: TrainConfig, num_parameters: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": cell.zero_stage}
    zero["reduce_bucket_size"] = min(num_parameters, BUCKET_NUMBERS)
    if cell.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if cell.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # rows are split here, not by DeepSpeed
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.optimizer.max_grad_norm if cell.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _deepspeed() -> Any:
    """DeepSpeed on the process group that exists; its import takes seconds, so it comes late."""
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled
    deepspeed.init_distributed(
        torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
    )
    return deepspeed
