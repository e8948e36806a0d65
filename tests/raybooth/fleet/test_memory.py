"""Memory of a pack is told from headers: counts are exact, estimates grow as they must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import RESOLUTION, write_tiny_base

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


def test_half_precision_halves_what_is_not_a_state(shape: BaseShape) -> None:
    slots = (SlotShape(4, 8),)
    full = pack_memory_bytes(shape, slots, targets=ATTENTION, resolution=1024, precision="fp32")
    half = pack_memory_bytes(shape, slots, targets=ATTENTION, resolution=1024, precision="bf16")
    states = adapter_parameters(shape, ATTENTION, 4) * 16
    assert full - PROCESS_BYTES - states == pytest.approx(
        2 * (half - PROCESS_BYTES - states), abs=4
    )


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
