"""Sites, init and keys are diffusers' and PEFT's."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from raybooth.errors import BaseModelError, InputError
from raybooth.model.lora import (
    LoraPair,
    Site,
    adapter_parameters,
    find_sites,
    from_diffusers_keys,
    init_pair,
    load_adapter,
    save_adapter,
    to_diffusers_keys,
)

LINEAR = Site("attn.to_q", "linear", 8, 6)
CONV = Site("resnets.0.conv1", "conv", 5, 7, (3, 3), (1, 1), (1, 1))


@pytest.fixture(scope="module")
def sd15() -> nn.Module:
    """Stable Diffusion 1.5's denoiser without its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def _random(site: Site, rank: int, seed: int) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(site.down_shape(rank), generator=generator)
    return LoraPair(down, torch.randn(site.up_shape(rank), generator=generator))


def test_attention_sites_of_stable_diffusion_are_those_of_diffusers_scripts(
    sd15: nn.Module,
) -> None:
    sites = find_sites(sd15, "attention")
    state = to_diffusers_keys({s.name: init_pair(s, 4, torch.Generator()) for s in sites}, 1.0)
    parts = [sum(f".{block}" in f".{s.name}" for s in sites) for block in ("down", "mid", "up")]
    assert len(sites) == 128
    assert [2 * count for count in parts] == [96, 16, 144]
    assert len(state) == 256
    assert adapter_parameters(sites, 4) == sum(t.numel() for t in state.values()) == 797_184
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora.down.weight"
    assert key in state


def test_all_adds_feed_forward_projections_and_convolutions(sd15: nn.Module) -> None:
    names = {site.name for site in find_sites(sd15, "all")}
    assert {s.name for s in find_sites(sd15, "attention")} < names
    for name in (
        "mid_block.attentions.0.proj_in",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
        "down_blocks.1.resnets.0.conv_shortcut",
        "up_blocks.3.resnets.2.conv2",
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.upsamplers.0.conv",
    ):
        assert name in names
    assert not any("time_emb" in name or name in ("conv_in", "conv_out") for name in names)


def test_patterns_match_whole_names_at_the_end(sd15: nn.Module) -> None:
    sites = find_sites(sd15, ("mid_block.attentions.0.proj_out", "attn2.to_k"))
    assert sum(site.name.endswith("attn2.to_k") for site in sites) == 16
    assert [s.kind for s in sites if s.name.endswith("proj_out")] == ["conv"]


def test_a_star_takes_the_layers_among_its_matches(sd15: nn.Module) -> None:
    sites = find_sites(sd15, ("mid_block.*", "down_blocks.?.attentions.*.ff.*"))
    assert {site.kind for site in sites} == {"linear", "conv"}
    assert any(site.name == "mid_block.resnets.0.conv1" for site in sites)
    assert sum(site.name.startswith("down_blocks") for site in sites) == 3 * 2 * 2


@pytest.mark.parametrize("targets", [("to_q", "o_q"), ("to_q", "nothing.*"), ("nothing",), ()])
def test_a_pattern_that_matches_nothing_is_refused(
    sd15: nn.Module, targets: tuple[str, ...]
) -> None:
    with pytest.raises(InputError, match="matches no layer"):
        find_sites(sd15, targets)


def test_a_layer_that_is_not_linear_or_convolution_is_refused(sd15: nn.Module) -> None:
    with pytest.raises(InputError, match="not a plain linear or convolution"):
        find_sites(sd15, ("mid_block",))


@pytest.mark.parametrize("rank", [4, 16])
def test_init_is_peft_gaussian(rank: int) -> None:
    pair = init_pair(Site("x", "linear", 4096, 8), rank, torch.Generator().manual_seed(0))
    reference = nn.init.normal_(
        torch.empty(rank, 4096), std=1 / rank, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(pair.down, reference)
    assert pair.down.std().item() == pytest.approx(1 / rank, rel=0.03)
    assert not pair.up.any()


def test_classic_keys_carry_the_scale_in_up(tmp_path: Path) -> None:
    tensors = {site.name: _random(site, 3, seed) for seed, site in enumerate((LINEAR, CONV))}
    save_adapter(tmp_path / "a.safetensors", tensors, scale=0.5)
    state = load_file(tmp_path / "a.safetensors")
    assert sorted(state) == [
        "unet.attn.to_q.lora.down.weight",
        "unet.attn.to_q.lora.up.weight",
        "unet.resnets.0.conv1.lora.down.weight",
        "unet.resnets.0.conv1.lora.up.weight",
    ]
    assert state["unet.resnets.0.conv1.lora.down.weight"].shape == (3, 5, 3, 3)
    assert state["unet.resnets.0.conv1.lora.up.weight"].shape == (7, 3, 1, 1)
    loaded = load_adapter(tmp_path / "a.safetensors")
    for name, pair in tensors.items():
        assert torch.equal(loaded[name].down, pair.down)
        assert torch.equal(loaded[name].up, pair.up * 0.5)


def test_peft_keys_and_alpha_are_read() -> None:
    pair = _random(LINEAR, 4, 0)
    loaded = from_diffusers_keys(
        {
            "unet.attn.to_q.lora_A.weight": pair.down.half(),
            "unet.attn.to_q.lora_B.weight": pair.up.half(),
            "unet.attn.to_q.alpha": torch.tensor(2.0),
        }
    )
    assert torch.equal(loaded["attn.to_q"].up, pair.up.half().float() * 0.5)
    assert loaded["attn.to_q"].down.dtype == torch.float32


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["unet.attn.to_q.lora.down.weight"], "half of a LoRA pair"),
        (["unet.attn.to_q.alpha"], "half of a LoRA pair"),
        (["unet.attn.to_q.weight"], "not a LoRA of the denoiser"),
        (["text_encoder.a.q_proj.lora_A.weight"], "half of a LoRA pair"),
        (["text_encoder.a.q_proj.weight"], "not a LoRA of the denoiser or a text encoder"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, keys: list[str], message: str) -> None:
    save_file({key: torch.ones(1) for key in keys}, tmp_path / "a.safetensors")
    with pytest.raises(BaseModelError, match=message):
        load_adapter(tmp_path / "a.safetensors")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x80pickle, not safetensors")
    with pytest.raises(BaseModelError, match="not a readable safetensors"):
        load_adapter(tmp_path / "a.safetensors")
