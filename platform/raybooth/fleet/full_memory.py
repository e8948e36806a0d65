"""Predicts the memory of one worker of a full run (DeepSpeed ZeRO, Rajbhandari et al. 2020).

bytes = process + base + its share of master, gradients and moments + a bucket + activations

Weights are float32 and their own masters at stage 0; from stage 1 on DeepSpeed keeps a worker's
share of them once more. What is offloaded lies on the host: it counts where the CPU trains.
"""

from __future__ import annotations

import math

from raybooth.config import TrainConfig
from raybooth.fleet.activations import Adapters, Rows, activation_bytes
from raybooth.fleet.memory import BACKWARD_WIDTHS, BYTES, PROCESS_BYTES, BaseShape
from raybooth.training.full_matrix import BUCKET_NUMBERS

MIN_8BIT_SIZE = 4096
"""Smaller tensors keep moments of 32 bits (training/optim.py)."""

BYTES_8BIT = 2 + 2 * 4 / 256
"""Of both moments of a number, with the scales of their blocks of 256."""


def full_memory_bytes(shape: BaseShape, train: TrainConfig, *, on_gpu: bool = False) -> int:
    """Predicted bytes of one worker on its device: its GPU, or the host where a CPU trains.

    On a CPU a checkpoint is held twice more while it is written: as tensors and as their file.
    Validation has a copy of what trains on the device, on a CPU its gathered weights beside it.
    """
    weights = 4 * (shape.num_denoiser_parameters + shape.num_other_parameters)
    whole = PROCESS_BYTES + weights + full_tensor_bytes(shape, train, on_gpu=on_gpu)
    trained = 4 * sum(_sizes(shape, train))
    if train.validation.enabled:
        whole += trained if on_gpu else 2 * trained
    return whole if on_gpu else whole + 2 * (trained + _moment_bytes(shape, train))


def full_tensor_bytes(shape: BaseShape, train: TrainConfig, *, on_gpu: bool = False) -> int:
    """Predicted bytes that training adds to the base's own weights, at the peak of one worker."""
    full = train.full
    whole = 4 * sum(_sizes(shape, train))
    bucket = min(whole, 4 * BUCKET_NUMBERS)
    share = math.ceil(whole / full.num_workers)
    forward = _activation_bytes(shape, train, on_gpu=on_gpu)
    own = _moment_bytes(shape, train)
    accumulated = full.gradient_accumulation > 1
    if full.zero_stage == 0:
        return own + max(forward + accumulated * whole, whole + bucket)
    own += share  # the master
    if full.offload != "none":  # gradients and a buffer beside master and moments, on the host
        own = 0 if on_gpu else own + 2 * share
    if full.zero_stage == 3:
        partition = 0 if full.offload == "all" and on_gpu else share  # the whole comes and goes
        gradients = share if full.offload == "none" else 0
        return own + partition + gradients + bucket + max(forward, share)
    waiting = whole + share if full.zero_stage == 1 else share  # gradients when backward ends
    return own + bucket + max(forward + accumulated * share, waiting)


def _sizes(shape: BaseShape, train: TrainConfig) -> list[int]:
    """Numbers in each tensor that trains."""
    texts = shape.texts if train.full.text_encoder else ()
    parts = [shape.denoiser, *(text.weights for text in texts)]
    return [math.prod(dims) for part in parts for dims in part.values()]


def _moment_bytes(shape: BaseShape, train: TrainConfig) -> int:
    """Of one worker's share; paged moments are counted too."""
    sizes = _sizes(shape, train)
    if train.full.zero_stage:  # flat pieces
        sizes = [math.ceil(sum(sizes) / train.full.num_workers)]
    is_8bit = train.optimizer.name != "adamw"
    return sum(
        math.ceil(size * (BYTES_8BIT if is_8bit and size >= MIN_8BIT_SIZE else 8)) for size in sizes
    )


def _activation_bytes(shape: BaseShape, train: TrainConfig, *, on_gpu: bool) -> int:
    """Of the rows that a worker takes at a time; autocast keeps a copy of the weights."""
    item = BYTES[train.precision]
    parts = train.full.num_workers * train.full.gradient_accumulation
    count = math.ceil(train.num_rows / parts)
    rows = Rows(
        count=count,
        per_slot=count,
        side=train.resolution // shape.vae_scale_factor,
        item=item,
        norm_item=BYTES["fp32"] if on_gpu else item,
    )
    every = Adapters(lambda name: True, rank=0)
    checkpointing = train.gradient_checkpointing
    saved = activation_bytes(shape.denoiser, rows, every, checkpointing=checkpointing)
    for text in shape.texts if train.full.text_encoder else ():
        if checkpointing:
            saved += text.checkpointed_bytes(count, item)
        else:
            saved += text.activation_bytes(None, 0, count, item)
    if item < BYTES["fp32"]:
        saved += item * sum(_sizes(shape, train))
    widest = shape.block_channels[0] * count * rows.side**2 * item
    return saved + BACKWARD_WIDTHS * widest
