"""What a worker needs by the train configs of its subjects: a pack of adapters, or a full run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raybooth.config import TrainConfig
from raybooth.fleet.full_memory import full_memory_bytes, full_tensor_bytes
from raybooth.fleet.memory import (
    BaseShape,
    SlotShape,
    TextTraining,
    pack_memory_bytes,
    pack_tensor_bytes,
)
from raybooth.model.targets import PRESETS, TEXT_PRESETS


def worker_memory_bytes(
    shape: BaseShape, trains: Sequence[TrainConfig], *, on_gpu: bool = False
) -> int:
    """Predicted bytes of one worker on its device, with process and base."""
    if trains[0].method == "full":
        return full_memory_bytes(shape, trains[0], on_gpu=on_gpu)
    return pack_memory_bytes(shape, _slots(trains), **_shared(trains[0]), on_gpu=on_gpu)


def worker_tensor_bytes(
    shape: BaseShape, trains: Sequence[TrainConfig], *, on_gpu: bool = False
) -> int:
    """Predicted bytes that training adds to the base's weights at the peak of one worker."""
    if trains[0].method == "full":
        return full_tensor_bytes(shape, trains[0], on_gpu=on_gpu)
    return pack_tensor_bytes(shape, _slots(trains), **_shared(trains[0]), on_gpu=on_gpu)


def _slots(trains: Sequence[TrainConfig]) -> list[SlotShape]:
    return [
        SlotShape(
            rank=train.adapter.rank,
            num_rows=train.num_rows,
            eight_bit=train.optimizer.name != "adamw",
            num_prompts=_num_prompts(train),
        )
        for train in trains
    ]


def _num_prompts(train: TrainConfig) -> int:
    """At most: a caption for each instance row, and the class prompt."""
    if not train.adapter.trains_text:
        return 0
    return train.batch_size + (train.num_rows > train.batch_size)


def _shared(train: TrainConfig) -> dict[str, Any]:
    """What all slots of a pack have in common."""
    adapter = train.adapter
    words = () if adapter.text_targets is None else adapter.text_targets
    return {
        "targets": PRESETS[adapter.targets]
        if isinstance(adapter.targets, str)
        else adapter.targets,
        "text": TextTraining(
            TEXT_PRESETS[words] if isinstance(words, str) else words, adapter.identifier_tokens
        ),
        "resolution": train.resolution,
        "precision": train.precision,
        "gradient_checkpointing": train.gradient_checkpointing,
    }
