"""SlotAdamW against torch's and bitsandbytes' own optimisers, slot by slot."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from raybooth.config import OptimizerConfig
from raybooth.errors import ConfigError
from raybooth.training.optim import SlotAdamW, SlotUpdate, clip_coefficient, lr_at

SIZE = 512
CONFIGS = (
    OptimizerConfig(learning_rate=1e-3),
    OptimizerConfig(learning_rate=3e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3),
    OptimizerConfig(learning_rate=5e-4, weight_decay=0.0, max_grad_norm=0.05),
)
ACTIVE = ({0, 1}, {0, 1}, {0, 1, 2}, {0, 1, 2}, {0, 2}, {0, 2}, {0, 2}, {0, 1, 2})
"""Slot 2 joins late, slot 1 leaves early and comes back."""


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run_slots(
    configs: tuple[OptimizerConfig, ...], rows_SP: Tensor, active: tuple[set[int], ...]
) -> tuple[Tensor, SlotAdamW]:
    flat_SP = torch.cat([torch.zeros_like(rows_SP[:1]), rows_SP]).clone()
    size = rows_SP.shape[1]
    optimizer = SlotAdamW(flat_SP)
    for slot, config in enumerate(configs, 1):
        optimizer.join(slot, config, torch.arange(size), size)
    for step, names in enumerate(active):
        grad_SP = torch.zeros_like(flat_SP)
        updates = []
        for name in sorted(names):
            grad_P = gradient(step, name, size, rows_SP.dtype)
            grad_SP[name + 1] = grad_P
            coefficient = clip_coefficient(grad_P.norm().item(), configs[name].max_grad_norm)
            updates.append(SlotUpdate(name + 1, configs[name].learning_rate, coefficient))
        optimizer.step(grad_SP, updates)
    return flat_SP, optimizer


def gradient(step: int, name: int, size: int, dtype: torch.dtype) -> Tensor:
    return draw(100 * name + step, size, dtype=torch.float64).to(dtype) * 0.1


def run_alone(
    kind: type[torch.optim.Optimizer],
    config: OptimizerConfig,
    row_P: Tensor,
    name: int,
    active: tuple[set[int], ...],
) -> Tensor:
    weight = torch.nn.Parameter(row_P.clone())
    optimizer = kind(
        [weight],
        lr=config.learning_rate,  # type: ignore[call-arg]
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    for step, names in enumerate(active):
        if name in names:
            weight.grad = gradient(step, name, row_P.shape[0], row_P.dtype)
            torch.nn.utils.clip_grad_norm_([weight], config.max_grad_norm)
            optimizer.step()
    return weight.detach()


def test_every_slot_is_torch_adamw_alone_with_late_join_and_early_leave() -> None:
    rows_SP = draw(7, 3, SIZE)
    flat_SP, optimizer = run_slots(CONFIGS, rows_SP, ACTIVE)
    for name, config in enumerate(CONFIGS):
        alone_P = run_alone(torch.optim.AdamW, config, rows_SP[name], name, ACTIVE)
        assert (flat_SP[name + 1] - alone_P).abs().max() <= 1e-12
        assert (alone_P - rows_SP[name]).abs().max() > 1e-4
        assert optimizer.opt_step(name + 1) == sum(name in names for names in ACTIVE)
    assert (flat_SP[0] == 0).all()


def test_a_resting_slot_does_not_move_at_all() -> None:
    rows_SP = draw(3, 2, SIZE, dtype=torch.float32)
    flat_SP, optimizer = run_slots(CONFIGS[:2], rows_SP, ({0, 1}, {0, 1}))
    weights, state = flat_SP[2].clone(), optimizer.state(2)
    optimizer.step(torch.zeros_like(flat_SP), [SlotUpdate(1, 0.1, 1.0)])
    assert torch.equal(flat_SP[2], weights)
    assert all(torch.equal(state[key], value) for key, value in optimizer.state(2).items())


def test_padding_stays_zero() -> None:
    own = 300
    flat_SP = torch.zeros(2, SIZE)
    flat_SP[1, :own] = draw(0, own, dtype=torch.float32)
    for name in ("adamw", "adamw8bit"):
        optimizer = SlotAdamW(flat_SP)
        optimizer.join(1, OptimizerConfig(name=name), torch.arange(own), SIZE)
        for step in range(5):
            grad_SP = torch.zeros_like(flat_SP)
            grad_SP[1, :own] = draw(step, own, dtype=torch.float32)
            optimizer.step(grad_SP, [SlotUpdate(1, 0.1, 1.0)])
        assert (flat_SP[:, own:] == 0).all()
        assert (flat_SP[0] == 0).all()


@pytest.mark.parametrize("size", [2048, 4096, 8192])
def test_every_8bit_slot_is_bitsandbytes_alone(size: int) -> None:
    configs = tuple(config.model_copy(update={"name": "adamw8bit"}) for config in CONFIGS)
    rows_SP = draw(5, 3, size, dtype=torch.float32)
    flat_SP, optimizer = run_slots(configs, rows_SP, ACTIVE)
    for name, config in enumerate(configs):
        alone_P = run_alone(bitsandbytes.optim.AdamW8bit, config, rows_SP[name], name, ACTIVE)
        is_8bit = "state1" in optimizer.state(name + 1)
        assert is_8bit == (size >= 4096)
        # one rounding apart: the clip coefficient is a double here, a float there
        torch.testing.assert_close(flat_SP[name + 1], alone_P, rtol=2.4e-7, atol=2e-8)


def test_8bit_blocks_follow_the_slot_not_the_bank_row() -> None:
    """A slot scattered over a wider row trains as it does in a row of its own."""
    size, width = 4096, 8192
    index_N = torch.randperm(width, generator=torch.Generator().manual_seed(1))[:size].sort().values
    config = OptimizerConfig(name="adamw8bit", learning_rate=1e-2)
    start_N = draw(2, size, dtype=torch.float32)
    wide_SP, narrow_SP = torch.zeros(2, width), torch.zeros(2, size)
    wide_SP[1, index_N], narrow_SP[1] = start_N, start_N
    wide, narrow = SlotAdamW(wide_SP), SlotAdamW(narrow_SP)
    wide.join(1, config, index_N, size)
    narrow.join(1, config, torch.arange(size), size)
    for step in range(6):
        grad_N = gradient(step, 0, size, torch.float32)
        grad_wide_SP = torch.zeros_like(wide_SP)
        grad_wide_SP[1, index_N] = grad_N
        wide.step(grad_wide_SP, [SlotUpdate(1, 1e-2, 1.0)])
        narrow.step(torch.stack([torch.zeros_like(grad_N), grad_N]), [SlotUpdate(1, 1e-2, 1.0)])
    assert torch.equal(wide_SP[1, index_N], narrow_SP[1])


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_state_continues_bit_for_bit(name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=1e-2)
    flat_SP = torch.stack([torch.zeros(4096), draw(0, 4096, dtype=torch.float32)])
    optimizer = SlotAdamW(flat_SP)
    optimizer.join(1, config, torch.arange(4096), 4096)

    def step(optimizer: SlotAdamW, flat_SP: Tensor, number: int) -> None:
        grad_P = gradient(number, 0, 4096, torch.float32)
        updates = [SlotUpdate(1, 1e-2, 1.0)]
        optimizer.step(torch.stack([torch.zeros_like(grad_P), grad_P]), updates)

    for number in range(3):
        step(optimizer, flat_SP, number)
    again_SP = flat_SP.clone()
    again = SlotAdamW(again_SP)
    again.join(1, config, torch.arange(4096), 4096, optimizer.state(1), optimizer.opt_step(1))
    for number in range(3, 6):
        step(optimizer, flat_SP, number)
        step(again, again_SP, number)
    assert torch.equal(flat_SP, again_SP)


def test_8bit_needs_float32_masters() -> None:
    optimizer = SlotAdamW(torch.zeros(2, 4096, dtype=torch.float64))
    with pytest.raises(ConfigError, match="float32"):
        optimizer.join(1, OptimizerConfig(name="adamw8bit"), torch.arange(4096), 4096)


def test_clip_coefficient_is_torchs() -> None:
    for norm in (0.0, 0.5, 1.0, 40.0):
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        weight.grad = torch.tensor([norm], dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        assert weight.grad.item() == pytest.approx(norm * clip_coefficient(norm, 1.0), rel=1e-15)


def test_float32_masters_move_at_small_rates() -> None:
    """Pure bf16 weights would move 8 % of the distance (100 equal steps at 5e-6)."""
    start_P = draw(0, SIZE, dtype=torch.float32) * 0.25
    flat_SP = torch.stack([torch.zeros(SIZE), start_P])
    optimizer = SlotAdamW(flat_SP)
    optimizer.join(1, OptimizerConfig(weight_decay=0.0), torch.arange(SIZE), SIZE)
    for _ in range(100):
        optimizer.step(torch.ones_like(flat_SP), [SlotUpdate(1, 5e-6, 1.0)])
    moved_P = start_P - flat_SP[1]
    assert ((moved_P / (100 * 5e-6) - 1).abs() < 0.02).float().mean() >= 0.99


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_lr_is_diffusers_get_scheduler(schedule: str, warmup: int) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_steps=warmup, learning_rate=3e-4)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=12)
    for step in range(12):
        assert lr_at(config, step, 12) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_paged_states_need_cuda() -> None:
    config = OptimizerConfig(name="paged_adamw8bit")
    with pytest.raises(ConfigError, match="needs CUDA's unified memory"):
        SlotAdamW(torch.zeros(2, 4096)).join(1, config, torch.arange(4096), 4096)
