"""A subject's words are diffusers': text-encoder LoRA and learned tokens, alone and in a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tests.tiny import write_tiny_base, write_tiny_sdxl
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from raybooth.errors import BaseModelError, InputError
from raybooth.model.bank import Bank
from raybooth.model.base import Base, encode_prompts, load_base
from raybooth.model.learned import (
    LearnedTokens,
    init_tokens,
    load_learned,
    save_learned,
    token_names,
    with_tokens,
)
from raybooth.model.lora import (
    AdapterTensors,
    LoraPair,
    adapter_parameters,
    denoiser_part,
    find_sites,
    find_text_sites,
    from_diffusers_keys,
    init_pair,
    load_adapter,
    save_adapter,
    to_diffusers_keys,
)
from raybooth.model.sampler import SampleRequest, generate
from raybooth.model.text_adapter import TextAdapter, load_text_adapter

PROMPT = "a photo of <robot> dog on the beach"
STEPS = {"num_inference_steps": 3, "guidance_scale": 5.0}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    write = write_tiny_base if request.param == "sd" else write_tiny_sdxl
    return load_base(str(write(folder)))


def _adapter(base: Base, seed: int = 0, rank: int = 2) -> AdapterTensors:
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(base.denoiser, "attention") + find_text_sites(
        base.text_encoders, "attention"
    )
    return {
        site.key: LoraPair(
            init_pair(site, rank, generator).down,
            torch.randn(site.up_shape(rank), generator=generator) * 0.3,
        )
        for site in sites
    }


def _learned(base: Base, number: int = 2) -> LearnedTokens:
    vectors = init_tokens(base, "cat", number, torch.Generator().manual_seed(5))
    return LearnedTokens("<robot>", {part: tokens * 3 for part, tokens in vectors.items()})


def _pipeline(base: Base) -> Any:
    kind = StableDiffusionXLPipeline if len(base.text_encoders) > 1 else StableDiffusionPipeline
    options: dict[str, Any] = {"add_watermarker": False}
    if kind is StableDiffusionPipeline:
        options = {"safety_checker": None}
    pipeline: Any = kind.from_pretrained(base.folder, local_files_only=True, **options)
    pipeline.scheduler = DDIMScheduler.from_config(
        base.scheduler_config, clip_sample=False, thresholding=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load(pipeline: Any, folder: Path, learned: LearnedTokens) -> None:
    """As diffusers' own documents tell to."""
    pipeline.load_lora_weights(folder, weight_name="lora.safetensors")
    file = folder / "learned_embeds.safetensors"
    if len(learned.vectors) == 1:
        pipeline.load_textual_inversion(folder)
        return
    state = load_file(file)
    names = token_names(learned.name, learned.num_tokens)
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        pipeline.load_textual_inversion(
            state[key],
            token=names,
            text_encoder=getattr(pipeline, f"text_encoder{number}"),
            tokenizer=getattr(pipeline, f"tokenizer{number}"),
        )


def _image(pipeline: Any, **changes: Any) -> Any:
    out = pipeline(
        PROMPT,
        generator=torch.Generator().manual_seed(3),
        height=32,
        width=32,
        negative_prompt="red",
        output_type="np",
        **{**STEPS, **changes},
    )
    return out.images[0]


def _apart(ours: Any, theirs: Any) -> int:
    pixels = np.round(theirs * 255)
    return int(np.abs(np.asarray(ours, dtype=float) - pixels).max())


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_an_image_is_that_of_diffusers_with_lora_and_textual_inversion(
    base: Base, tmp_path: Path, scale: float
) -> None:
    """Loaded from the published files; also beside other subjects in one batch."""
    tensors, learned = _adapter(base), _learned(base)
    save_adapter(tmp_path / "lora.safetensors", tensors, 1.0)
    save_learned(tmp_path / "learned_embeds.safetensors", learned)
    pipeline = _pipeline(base)
    bare = _image(pipeline)
    _load(pipeline, tmp_path, learned)
    pipeline.set_adapters(pipeline.get_active_adapters(), [scale])
    theirs = _image(pipeline)

    loaded = load_adapter(tmp_path / "lora.safetensors")
    text = load_text_adapter(base, loaded, tmp_path / "learned_embeds.safetensors")
    assert text is not None
    sites = find_sites(base.denoiser, "attention")
    bank = Bank(base.denoiser, sites=sites, rank=2, num_slots=2, device="cpu")
    bank.write(1, denoiser_part(loaded))
    other = _adapter(base, 1)
    bank.write(2, denoiser_part(other))
    request = SampleRequest(
        PROMPT,
        "red",
        3,
        solver="ddim",
        height=32,
        width=32,
        slot=1,
        text=text,
        adapter_scale=scale,
        **STEPS,
    )
    neighbour = replace(
        request, slot=2, seed=4, prompt="a photo of a dog", text=TextAdapter(base, other)
    )
    plain = replace(request, slot=0, text=None)
    (alone,) = generate(base, bank, [request])
    mixed = generate(base, bank, [neighbour, request, plain])[1]
    bank.detach()
    assert _apart(alone, theirs) <= 1
    assert _apart(mixed, np.asarray(alone) / 255) <= 1
    assert _apart(alone, bare) > 4


@pytest.mark.parametrize("what", ["lora", "tokens"])
def test_either_part_alone_is_diffusers_embedding(base: Base, what: str, tmp_path: Path) -> None:
    tensors, learned = _adapter(base), _learned(base, 1)
    pipeline = _pipeline(base)
    if what == "lora":
        save_adapter(tmp_path / "lora.safetensors", tensors, 1.0)
        pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        text = TextAdapter(base, tensors)
    else:
        save_learned(tmp_path / "learned_embeds.safetensors", learned)
        if len(learned.vectors) == 1:
            pipeline.load_textual_inversion(tmp_path)
        else:
            state = load_file(tmp_path / "learned_embeds.safetensors")
            for key, n in (("clip_l", ""), ("clip_g", "_2")):
                parts = {p: getattr(pipeline, f"{p}{n}") for p in ("text_encoder", "tokenizer")}
                pipeline.load_textual_inversion(state[key], token="<robot>", **parts)
        text = TextAdapter(base, {}, learned)
    with torch.no_grad():
        theirs = pipeline.encode_prompt(
            PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    ours = text.encode(PROMPT)
    bare = encode_prompts(base, [PROMPT])
    expected = {"encoder_hidden_states": theirs[0]}
    if len(base.text_encoders) > 1:
        expected["text_embeds"] = theirs[2]
    for name, tensor in expected.items():
        assert torch.allclose(ours[name], tensor, atol=2e-5), name
        assert (ours[name] - bare[name]).abs().max() > 1e-2


def test_the_base_is_left_as_it_was(base: Base) -> None:
    before, size = encode_prompts(base, [PROMPT]), len(base.tokenizer)
    TextAdapter(base, _adapter(base), _learned(base)).encode(PROMPT)
    after = encode_prompts(base, [PROMPT])
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(base.tokenizer) == size


def test_learned_tokens_round_trip_and_name_themselves(base: Base, tmp_path: Path) -> None:
    learned = _learned(base, 3)
    save_learned(tmp_path / "a.safetensors", learned)
    again = load_learned(tmp_path / "a.safetensors")
    assert (again.name, again.num_tokens) == ("<robot>", 3)
    assert again.vectors.keys() == learned.vectors.keys()
    for part, tokens in learned.vectors.items():
        assert torch.equal(again.vectors[part], tokens)


def test_foreign_tokens_are_refused(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"clip_l": torch.ones(1, 4), "clip_g": torch.ones(1, 6)}, path)
    with pytest.raises(BaseModelError, match="does not name its tokens"):
        load_learned(path)
    with pytest.raises(BaseModelError, match="do not fit this base"):
        TextAdapter(base, {}, load_learned(path, "<x>"))
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, path)
    with pytest.raises(BaseModelError, match="holds no learned tokens"):
        load_learned(path)
    with pytest.raises(BaseModelError, match="has a token of that name"):
        with_tokens(base.tokenizers, "<|endoftext|>", 1)


def test_text_pairs_of_another_base_are_refused(base: Base) -> None:
    pair = LoraPair(torch.ones(2, 5), torch.ones(5, 2))
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    with pytest.raises(BaseModelError, match="do not fit"):
        TextAdapter(base, {key: pair}).encode(PROMPT)
    with pytest.raises(BaseModelError, match="sites that this bank lacks"):
        TextAdapter(base, {key.replace(".0.", ".9."): pair}).encode(PROMPT)


def _clip_l() -> nn.Module:
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
    )


def _big_g() -> nn.Module:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            projection_dim=1280,
        )
    )


def test_text_sites_of_full_size_are_those_of_diffusers_scripts() -> None:
    """Tensors and parameters at rank 4, in classic keys whatever transformers calls them."""
    with torch.device("meta"):
        encoders = {"text_encoder": _clip_l(), "text_encoder_2": _big_g()}
    for part, count, number in (("text_encoder", 96, 294_912), ("text_encoder_2", 256, 1_310_720)):
        sites = find_text_sites({part: encoders[part]}, "attention")
        pairs = {s.key: init_pair(s, 4, torch.Generator()) for s in sites}
        state = to_diffusers_keys(pairs, 1.0)
        assert len(state) == count
        assert adapter_parameters(sites, 4) == sum(t.numel() for t in state.values()) == number
        stem = f"{part}.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
        assert {f"{stem}.down.weight", f"{stem}.up.weight"} <= state.keys()
    everything = find_text_sites({"text_encoder": encoders["text_encoder"]}, "all")
    assert len(everything) == 12 * 6
    starred = find_text_sites(encoders, ("layers.1?.*.q_proj", "fc1"))
    assert sum(site.name.endswith("q_proj") for site in starred) == 2 + 10
    with pytest.raises(InputError, match="to_q matches no layer"):
        find_text_sites(encoders, ("to_q",))


def test_both_key_generations_are_read() -> None:
    """transformers 5.6 dropped `text_model.`; PEFT's own names; alphas."""
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    name = "encoder.layers.0.self_attn.q_proj"
    key = f"text_encoder.text_model.{name}"
    for prefix in ("text_encoder.text_model.", "text_encoder."):
        for pair in (("lora_linear_layer.down", "lora_linear_layer.up"), ("lora_A", "lora_B")):
            stems = [f"{prefix}{name}.{half}.weight" for half in pair]
            state = {**dict(zip(stems, (down, up), strict=True))}
            found = from_diffusers_keys({**state, f"{prefix}{name}.alpha": torch.tensor(1.0)})
            assert found.keys() == {key}
            assert torch.equal(found[key].down, down)
            assert torch.equal(found[key].up, up * 0.5)
