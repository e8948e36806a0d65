"""How weights are updated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raybooth.reading import Strict


class OptimizerConfig(Strict):
    """AdamW (Loshchilov and Hutter 2019); 8-bit states by bitsandbytes (Dettmers et al. 2022)."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """`paged_adamw8bit` keeps its states in memory that CUDA pages out to the host."""

    learning_rate: float = Field(5e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm at which each slot is clipped on its own."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate curve after warm-up, over the slot's own train steps."""

    warmup_steps: int = Field(0, ge=0)
