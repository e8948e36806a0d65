"""Memory of a pack is told from headers: counts are exact, estimates grow as they must."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.raybooth.training.full_jobs import CLASS_PROMPT, full_job, one_process_group
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
    read_base_shape,
    read_header,
)
from raybooth.fleet.prediction import worker_tensor_bytes
from raybooth.model.base import Base, load_base
from raybooth.training.full import FullRun
from raybooth.training.full_matrix import OFFLOADS
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
    "text, words learned": (
        {"adapter": {"text_targets": "all", "identifier_tokens": 2, "targets": "attention"}},
        2,
    ),
    "text attention": ({"adapter": {"text_targets": "attention"}, "batch_size": 2}, 2),
    "bf16, checkpointed": ({"precision": "bf16", "gradient_checkpointing": True}, 2),
}


def case(overrides: dict[str, Any], count: int) -> list[SlotJob]:
    """Pictures of twice the base's side, so that activations are most of what there is."""
    jobs = [make_job(f"robot-{i}", i, **overrides, resolution=2 * RESOLUTION) for i in range(count)]
    return [
        replace(
            job,
            tensors=replace(_enlarged(job.tensors), prompts=("a photo of robot",)),
            class_noun="robot",
            class_prompt=CLASS_PROMPT,
        )
        for job in jobs
    ]


def _enlarged(tensors: SubjectTensors) -> SubjectTensors:
    assert tensors.prior is not None
    mean, std = (upsample(part) for part in (tensors.prior.mean_NCHW, tensors.prior.std_NCHW))
    prior = replace(tensors.prior, mean_NCHW=mean, std_NCHW=std)
    mean, std = (upsample(part) for part in (tensors.mean_NCHW, tensors.std_NCHW))
    return replace(tensors, mean_NCHW=mean, std_NCHW=std, prior=prior)


upsample = partial(torch.nn.functional.interpolate, scale_factor=2)


def predicted_bytes(shape: BaseShape, jobs: Sequence[SlotJob], *, on_gpu: bool = False) -> int:
    return worker_tensor_bytes(shape, [job.train for job in jobs], on_gpu=on_gpu)


def two_steps(base: Base, jobs: Sequence[SlotJob]) -> None:
    pack = Pack(base, jobs)
    pack.step()
    pack.step()
    pack.close()


def counted_bytes(action: Callable[[], None]) -> int:
    """The most that torch's allocator held at a time; what was there before is not counted."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
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
    base = load_base(str(folder), dtype=dtype)
    found = counted_bytes(lambda: two_steps(base, jobs))
    assert predicted_bytes(shape, jobs) == pytest.approx(found, rel=0.15)


FULL_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "small": {"resolution": RESOLUTION},
    "text encoder": {"full": {"text_encoder": True}},
    "text encoder, checkpointed": {
        "full": {"text_encoder": True},
        "gradient_checkpointing": True,
        "resolution": RESOLUTION,
    },
    "8-bit": {"optimizer": {"name": "adamw8bit"}, "resolution": RESOLUTION},
    "bf16": {"precision": "bf16"},
    "in two parts": {"full": {"gradient_accumulation": 2}},
}


@pytest.mark.parametrize("name", FULL_CASES)
def test_a_full_run_takes_what_was_predicted(name: str, folder: Path, shape: BaseShape) -> None:
    """One worker without ZeRO, two train steps, within 15 % of the allocator's own count."""
    one_process_group()
    job = full_job(**{"resolution": 2 * RESOLUTION, **FULL_CASES[name]})
    if job.train.resolution > RESOLUTION:
        job = replace(job, tensors=_enlarged(job.tensors))
    base = load_base(str(folder))

    def steps() -> None:
        run = FullRun(base, job)
        run.step()
        gc.collect()  # DeepSpeed may leave a bucket in a cycle
        run.step()
        run.close()

    found = counted_bytes(steps)
    assert worker_tensor_bytes(shape, [job.train]) == pytest.approx(found, rel=0.15)


def full_bytes(shape: BaseShape, *, on_gpu: bool = False, **full: Any) -> int:
    train = full_job(batch_size=8, gradient_checkpointing=True, full=full).train
    return worker_tensor_bytes(shape, [train], on_gpu=on_gpu)


def test_a_stage_shares_out_its_own_part(shape: BaseShape) -> None:
    """Of `whole` bytes of weights: W shares of masters and moments (3), and of gradients."""
    whole = 4 * shape.num_denoiser_parameters

    def saved(stage: int, offload: str = "none", on_gpu: bool = False) -> float:
        two, four = (
            full_bytes(
                shape,
                zero_stage=stage,
                num_workers=count,
                gradient_accumulation=8 // count,  # so that the rows at a time are the same
                offload=offload,
                on_gpu=on_gpu,
            )
            for count in (2, 4)
        )
        return (two - four) / (whole / 4)

    assert saved(0) == 0
    assert saved(1) >= 3
    assert saved(2) >= 3
    assert saved(3) == pytest.approx(5, rel=0.01)
    assert saved(3, "optimizer", on_gpu=True) == pytest.approx(1, rel=0.01)
    assert saved(3, "all", on_gpu=True) == 0


def test_offload_frees_the_gpu_and_not_a_cpu(shape: BaseShape) -> None:
    stages = {"zero_stage": 3, "num_workers": 2}
    kinds = [full_bytes(shape, on_gpu=True, offload=o, **stages) for o in OFFLOADS]
    assert kinds == sorted(kinds, reverse=True)
    assert len(set(kinds)) == 3
    assert full_bytes(shape, offload="all", **stages) > full_bytes(shape, **stages)


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
