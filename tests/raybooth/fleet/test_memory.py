"""Memory of a pack is told from headers: counts are exact, estimates grow as they must."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.raybooth.training.jobs import make_job
from tests.tiny import RESOLUTION, write_tiny_base
from torch.profiler import ProfilerActivity, profile

from raybooth.data.encode import SubjectTensors
from raybooth.errors import BaseModelError
from raybooth.fleet.memory import (
    PROCESS_BYTES,
    BaseShape,
    SlotShape,
    adapter_parameters,
    pack_memory_bytes,
    pack_tensor_bytes,
    read_base_shape,
    read_header,
)
from raybooth.model.base import Base, load_base
from raybooth.model.lora import PRESETS
from raybooth.training.job import SlotJob
from raybooth.training.pack import Pack

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("memory") / "base")


@pytest.fixture(scope="module")
def shape(folder: Path) -> BaseShape:
    return read_base_shape(folder)


def memory(shape: BaseShape, *slots: SlotShape, resolution: int = 512) -> int:
    return pack_memory_bytes(
        shape, slots, targets=ATTENTION, resolution=resolution, precision="fp32"
    )


def test_headers_tell_parameters_and_sizes(folder: Path, shape: BaseShape) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    assert shape.num_denoiser_parameters == sum(p.numel() for p in unet.parameters())
    others = [*vae.parameters(), *text.parameters()]
    assert shape.num_other_parameters == sum(p.numel() for p in others)
    assert shape.native_resolution == RESOLUTION
    assert shape.vae_scale_factor == 2 ** (len(vae.config.block_out_channels) - 1)


@pytest.mark.parametrize("targets", ["attention", "all", ("to_q", "conv1")])
def test_adapter_parameters_are_those_of_the_bank(
    folder: Path, shape: BaseShape, targets: str | tuple[str, ...]
) -> None:
    from raybooth.model.base import load_base
    from raybooth.model.lora import PRESETS, find_sites
    from raybooth.model.lora import adapter_parameters as exact

    sites = find_sites(load_base(str(folder)).denoiser, targets)
    suffixes = PRESETS[targets] if isinstance(targets, str) else targets
    assert adapter_parameters(shape, suffixes, 3) == exact(sites, 3)


def test_memory_grows_with_slots_rank_rows_and_resolution(shape: BaseShape) -> None:
    one = memory(shape, SlotShape(4, 2))
    assert one > PROCESS_BYTES
    assert memory(shape, SlotShape(4, 2), SlotShape(4, 2)) > one
    assert memory(shape, SlotShape(64, 2)) > one
    assert memory(shape, SlotShape(4, 4)) > one
    assert memory(shape, SlotShape(4, 2), resolution=1024) > one


Case = tuple[dict[str, Any], int]
CASES: dict[str, Case] = {
    "attention": ({"adapter": {"targets": "attention"}}, 1),
    "all": ({}, 1),
    "all, pack of four": ({"batch_size": 2}, 4),
    "all, rank 16": ({"adapter": {"rank": 16}}, 2),
    "8-bit": ({"optimizer": {"name": "adamw8bit"}}, 2),
    "checkpointed": ({"gradient_checkpointing": True}, 4),
    "bf16": ({"precision": "bf16", "batch_size": 4}, 2),
    "bf16, checkpointed": ({"precision": "bf16", "gradient_checkpointing": True}, 2),
}


def case(overrides: dict[str, Any], count: int) -> list[SlotJob]:
    """Pictures of twice the base's side, so that activations are most of what there is."""
    jobs = [make_job(f"robot-{i}", i, **overrides, resolution=2 * RESOLUTION) for i in range(count)]
    return [replace(job, tensors=_enlarged(job.tensors)) for job in jobs]


def _enlarged(tensors: SubjectTensors) -> SubjectTensors:
    assert tensors.prior is not None
    mean, std = (upsample(part) for part in (tensors.prior.mean_NCHW, tensors.prior.std_NCHW))
    prior = replace(tensors.prior, mean_NCHW=mean, std_NCHW=std)
    mean, std = (upsample(part) for part in (tensors.mean_NCHW, tensors.std_NCHW))
    return replace(tensors, mean_NCHW=mean, std_NCHW=std, prior=prior)


upsample = partial(torch.nn.functional.interpolate, scale_factor=2)


def predicted_bytes(shape: BaseShape, jobs: Sequence[SlotJob], *, on_gpu: bool = False) -> int:
    train = jobs[0].train
    eight_bit = train.optimizer.name != "adamw"
    slots = [SlotShape(j.train.adapter.rank, j.train.num_rows, eight_bit) for j in jobs]
    targets = train.adapter.targets
    return pack_tensor_bytes(
        shape,
        slots,
        targets=PRESETS[targets] if isinstance(targets, str) else targets,
        resolution=train.resolution,
        precision=train.precision,
        gradient_checkpointing=train.gradient_checkpointing,
        on_gpu=on_gpu,
    )


def counted_bytes(base: Base, jobs: Sequence[SlotJob]) -> int:
    """The most that torch's allocator held at a time for a pack of these jobs, two train steps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        pack = Pack(base, jobs)
        pack.step()
        pack.step()
        pack.close()
    now = most = 0
    assert profiled.profiler is not None
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("name", CASES)
def test_a_pack_takes_what_was_predicted(name: str, folder: Path, shape: BaseShape) -> None:
    """Within 15 % of the allocator's own count."""
    jobs = case(*CASES[name])
    dtype = torch.bfloat16 if jobs[0].train.precision == "bf16" else torch.float32
    found = counted_bytes(load_base(str(folder), dtype=dtype), jobs)
    assert predicted_bytes(shape, jobs) == pytest.approx(found, rel=0.15)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="cannot be read"):
        read_base_shape(tmp_path)
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({"block_out_channels": [8]}))
    with pytest.raises(BaseModelError, match="no safetensors weights"):
        read_base_shape(tmp_path)


@pytest.mark.parametrize("content", [b"", b"12", b"\xff" * 64, (5).to_bytes(8, "little") + b"{]"])
def test_a_broken_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(BaseModelError, match="not a safetensors file"):
        read_header(path)
