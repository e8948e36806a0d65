"""SDXL: words and images are StableDiffusionXLPipeline's, alone or in a mixed batch."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file
from tests.tiny import write_tiny_sdxl
from torch import Tensor

from raybooth.data.prior import PriorCache
from raybooth.data.prior_build import build_prior
from raybooth.data.prior_key import PriorKey
from raybooth.errors import BaseModelError
from raybooth.model.base import Base, encode_prompts, fingerprint_base, load_base, predict
from raybooth.model.full_weights import load_full, save_full, trained_parts
from raybooth.model.generation import GENERATOR_VERSION
from raybooth.model.sampler import SampleRequest, denoise_step, start_row

UNET = "unet/diffusion_pytorch_model.safetensors"
REQUEST = SampleRequest("a photo of a red dog", "a cat", 5, 4, 6.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def base(tiny: Path) -> Base:
    return load_base(str(tiny))


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> Any:
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def _edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _edit_weights(path: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def test_a_base_is_whole_and_frozen(base: Base) -> None:
    assert (base.native_resolution, base.scaling_factor) == (32, 0.13025)
    assert base.negative_is_zeros
    assert list(base.text_encoders) == ["text_encoder", "text_encoder_2"]
    assert list(base.tokenizers) == ["tokenizer", "tokenizer_2"]
    assert base.tokenizer is base.tokenizers["tokenizer"]
    for part in (base.denoiser, base.vae, *base.text_encoders.values()):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())


def test_prompts_are_encoded_as_the_pipeline_encodes_them(base: Base, pipe: Any) -> None:
    prompts = ["a photo of sks dog", "", "zebra " * 60]
    ours = encode_prompts(base, prompts)
    assert ours["encoder_hidden_states"].shape == (3, 77, 32 + 48)
    assert ours["text_embeds"].shape == (3, 24)
    for place, prompt in enumerate(prompts):
        with torch.no_grad():
            states, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu")
        assert torch.allclose(ours["encoder_hidden_states"][place], states[0], atol=1e-5)
        assert torch.allclose(ours["text_embeds"][place], pooled[0], atol=1e-5)


def test_conditioning_has_gradients_in_both_text_encoders(tiny: Path) -> None:
    base = load_base(str(tiny))
    for encoder in base.text_encoders.values():
        encoder.requires_grad_(True)
    ids = base.family.tokenize(base.tokenizers, ["a dog", "a red cat"])
    cond = base.family.condition(base.text_encoders, ids)
    torch.stack([tensor.square().sum() for tensor in cond.values()]).sum().backward()  # type: ignore[no-untyped-call]
    for encoder in base.text_encoders.values():
        gradient = next(encoder.parameters()).grad
        assert gradient is not None
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_both_forms_of_clip_keys_load(base: Base, copy: Path, part: str) -> None:
    """transformers 5.6 dropped `text_model.` from the first encoder; no version from both."""

    def renamed(state: dict[str, Any]) -> dict[str, Any]:
        form = "" if any(key.startswith("text_model.") for key in state) else "text_model."
        keys = {key: key.removeprefix("text_model.") for key in state}
        return {
            (key if key == "text_projection.weight" else form + key): state[old]
            for old, key in keys.items()
        }

    _edit_weights(copy / part / "model.safetensors", renamed)
    other = load_base(str(copy))
    assert other.fingerprint == base.fingerprint
    ours, theirs = (encode_prompts(one, ["a red dog"]) for one in (base, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "request_",
    [
        *(replace(REQUEST, solver=solver) for solver in ("ddim", "euler", "dpmpp2m")),
        replace(REQUEST, negative_prompt=""),
        replace(REQUEST, negative_prompt="", solver="euler", height=48, width=24),
        replace(REQUEST, guidance_scale=1.0, num_inference_steps=9),
    ],
    ids=["ddim", "euler", "dpmpp2m", "no negative", "another size", "no guidance"],
)
def test_an_image_is_the_pipelines(base: Base, pipe: Any, request_: SampleRequest) -> None:
    assert _apart(_latents(base, [request_])[0], _theirs(pipe, request_)) < 1e-5


def test_zeros_for_no_negative_prompt_are_the_pipelines_choice(copy: Path, base: Base) -> None:
    """`force_zeros_for_empty_prompt` false: the empty prompt, encoded."""
    _edit_json(copy / "model_index.json", force_zeros_for_empty_prompt=False)
    other = load_base(str(copy))
    assert other.fingerprint != base.fingerprint
    pipe = StableDiffusionXLPipeline.from_pretrained(copy, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    request = replace(REQUEST, negative_prompt="")
    ours = _latents(other, [request])[0]
    assert _apart(ours, _theirs(pipe, request)) < 1e-5
    assert _apart(ours, _latents(base, [request])[0]) > 1e-3


def test_a_mixed_batch_changes_no_bit_of_an_image_at_one_bucket(base: Base) -> None:
    requests = [
        REQUEST,
        replace(REQUEST, negative_prompt="", solver="ddim", num_inference_steps=3, seed=2),
        replace(REQUEST, prompt="a vase", guidance_scale=1.0, solver="euler", seed=3),
    ]
    mixed = _latents(base, requests, bucket=8)
    for request, latents in zip(requests, mixed, strict=True):
        assert torch.equal(_latents(base, [request], bucket=8)[0], latents)


def test_the_denoiser_hears_sizes_and_pooled_text(base: Base) -> None:
    latents = torch.randn(1, base.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([500])
    cond = encode_prompts(base, ["a dog"]) | base.family.size_conditioning(
        (32, 32), (0, 0), (32,) * 2
    )
    assert cond["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]
    plain = predict(base, latents, timesteps, cond)
    moved = base.family.size_conditioning((900, 600), (3, 40), (32, 32))
    assert moved["time_ids"].tolist() == [[900, 600, 3, 40, 32, 32]]
    for name, tensor in {**moved, "text_embeds": cond["text_embeds"] + 1}.items():
        assert not torch.allclose(predict(base, latents, timesteps, {**cond, name: tensor}), plain)


def test_a_prior_keeps_all_its_conditioning(base: Base, tmp_path: Path) -> None:
    key = PriorKey(
        base_fingerprint=base.fingerprint,
        class_prompt="a photo of a dog",
        negative_prompt="",
        solver="ddim",
        num_inference_steps=2,
        guidance_scale=3.0,
        resolution=48,
        dtype="float32",
        generator_version=GENERATOR_VERSION,
    )
    cache = PriorCache(tmp_path)
    build_prior(base, cache, key, 2)
    prior = cache.load(key, 2)
    assert prior.mean_NCHW.shape == (2, base.latent_channels, 12, 12)
    expected = encode_prompts(base, ["a photo of a dog"])
    expected["time_ids"] = torch.tensor([[48.0, 48.0, 0.0, 0.0, 48.0, 48.0]])
    assert prior.conditioning.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(prior.conditioning[name], tensor)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer_2"])
def test_the_fingerprint_sees_both_text_encoders(base: Base, copy: Path, part: str) -> None:
    assert fingerprint_base(copy) == base.fingerprint
    if part == "tokenizer_2":
        file = copy / part / "tokenizer.json"
        file.write_text(file.read_text().replace("beach", "peach"))
    else:
        _edit_weights(
            copy / part / "model.safetensors",
            lambda state: {name: tensor + 1e-3 for name, tensor in state.items()},
        )
    assert fingerprint_base(copy) != base.fingerprint


def test_a_full_run_moves_and_keeps_both_text_encoders(tiny: Path, tmp_path: Path) -> None:
    moved, plain = load_base(str(tiny)), load_base(str(tiny))
    parts = trained_parts(moved, text_encoder=True)
    assert list(parts) == ["unet", "text_encoder", "text_encoder_2"]
    for part in parts.values():
        for weight in part.parameters():
            weight.data.mul_(1.01)
    save_full(tmp_path, {name: part.state_dict() for name, part in parts.items()})
    before = _latents(plain, [REQUEST])[0]
    load_full(plain, tmp_path, parts)
    assert torch.equal(_latents(plain, [REQUEST])[0], _latents(moved, [REQUEST])[0])
    assert not torch.equal(_latents(plain, [REQUEST])[0], before)


def _pickled(base: Path) -> None:
    (base / "text_encoder_2/model.safetensors").rename(base / "text_encoder_2/pytorch_model.bin")


def _unet(**values: Any) -> Callable[[Path], None]:
    """The denoiser with other figures, its weights made to fit."""

    def change(base: Path) -> None:
        from diffusers import UNet2DConditionModel

        config = UNet2DConditionModel.load_config(base / "unet")
        unet = UNet2DConditionModel.from_config({**config, **values})
        unet.save_pretrained(base / "unet")

    return change


def _index(name: str) -> Callable[[Path], None]:
    return lambda base: _edit_json(base / "model_index.json", _class_name=name)


def _short(base: Path) -> None:
    _edit_json(base / "tokenizer_2/tokenizer_config.json", model_max_length=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_pickled, "text_encoder_2 as a pickle"),
        (_index("StableDiffusionXLImg2ImgPipeline"), "does not train: found StableDiffusionXLImg"),
        (_index("StableDiffusionXLInpaintPipeline"), "does not train: found StableDiffusionXLInp"),
        (_index("StableDiffusionPipeline"), "addition_embed_type text_time"),
        (_unet(in_channels=9), "takes more than latents and text: found 9 channels in, 4 out"),
        (_unet(in_channels=8), "takes more than latents and text: found 8 channels in, 4 out"),
        (_unet(time_cond_proj_dim=8), "distilled to a guidance scale"),
        (_unet(projection_class_embeddings_input_dim=5 * 8 + 24), "as a refiner's does: found 64"),
        (_unet(cross_attention_dim=48), "as a refiner's does not: found 48 wide instead of 80"),
        (_unet(addition_embed_type=None), "takes no sizes"),
        (_short, "tokenizers differ in length: found tokenizer 77, tokenizer_2 64"),
    ],
)
def test_what_cannot_be_used_is_refused(
    copy: Path, change: Callable[[Path], None], message: str
) -> None:
    change(copy)
    with pytest.raises(BaseModelError, match=message):
        load_base(str(copy))


def _theirs(pipe: Any, request: SampleRequest) -> Tensor:
    """Plain diffusers, set as solver.py's docstring tells people to; no negative prompt is None."""
    config = pipe.scheduler.config
    if request.solver == "ddim":
        pipe.scheduler = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
    elif request.solver == "euler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(
            config, final_sigmas_type="zero", timestep_type="discrete"
        )
    else:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            config,
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            lower_order_final=True,
            euler_at_final=False,
            final_sigmas_type="zero",
            thresholding=False,
        )
    latents: Tensor = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt or None,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
    ).images
    return latents[0]


def _latents(base: Base, requests: list[SampleRequest], bucket: int | None = None) -> list[Tensor]:
    rows = [start_row(base, request) for request in requests]
    while active := [row for row in rows if not row.done]:
        denoise_step(base, None, active, bucket)
    return [row.latents_CHW for row in rows]


def _apart(ours: Tensor, reference: Tensor) -> float:
    """max|d| / max|ref|."""
    return float((ours - reference).abs().max() / reference.abs().max())
