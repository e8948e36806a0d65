"""Any Stable Diffusion 1.x or 2.x folder loads as it is; all else is refused with a reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.tiny import write_tiny_base

from raybooth.errors import BaseModelError
from raybooth.model.base import (
    Base,
    cut_tokens,
    encode_images,
    encode_prompts,
    fingerprint_base,
    load_base,
    load_tokenizer,
    predict,
    resolve_base,
    token_split,
)

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(tiny: Path) -> Base:
    return load_base(str(tiny))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def _edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _edit_weights(path: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def test_a_base_is_whole_and_frozen(base: Base) -> None:
    assert (base.native_resolution, base.latent_channels, base.vae_scale_factor) == (32, 4, 4)
    assert (base.prediction_type, base.scaling_factor) == ("epsilon", 0.18215)
    assert base.num_train_timesteps == 1000
    for part in (base.denoiser, base.vae, base.text_encoder):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


def test_every_weight_is_the_files(base: Base, tiny: Path) -> None:
    for part, file in (("denoiser", UNET), ("text_encoder", TEXT)):
        state = {
            key.removeprefix("text_model."): tensor
            for key, tensor in getattr(base, part).state_dict().items()
        }
        stored = load_file(tiny / file)
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[key], stored[key]) for key in stored)


def test_prompts_are_encoded_as_the_pipeline_encodes_them(base: Base, tiny: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None, local_files_only=True)
    prompts = ["a photo of sks dog", "", "zebra " * 60]
    ours = encode_prompts(base, prompts)["encoder_hidden_states"]
    assert ours.shape == (3, 77, 32)
    for place, prompt in enumerate(prompts):
        with torch.no_grad():
            theirs = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
        assert torch.equal(ours[place], theirs[0])


def test_both_forms_of_clip_keys_load(base: Base, copy: Path) -> None:
    """transformers 5.6 dropped `text_model.`; older files also hold position ids."""
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    _edit_weights(copy / TEXT, lambda state: {f"text_model.{k}": v for k, v in state.items()} | ids)
    old = load_base(str(copy))
    prompts = ["a photo of a red dog"]
    assert torch.equal(
        encode_prompts(old, prompts)["encoder_hidden_states"],
        encode_prompts(base, prompts)["encoder_hidden_states"],
    )
    assert old.fingerprint == base.fingerprint


def test_sharded_weights_load(base: Base, copy: Path) -> None:
    whole = load_file(copy / TEXT)
    names = sorted(whole)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for shard, keys in shards.items():
        save_file({key: whole[key] for key in keys}, copy / "text_encoder" / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = {"metadata": {}, "weight_map": weight_map}
    (copy / "text_encoder/model.safetensors.index.json").write_text(json.dumps(index))
    (copy / TEXT).unlink()
    assert load_base(str(copy)).fingerprint == base.fingerprint


def test_predictions_take_fractions_of_a_timestep_and_any_dtype(base: Base, tiny: Path) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = encode_prompts(base, ["a dog", "a cat"])
    out = predict(base, latents, torch.tensor([3, 700]), cond)
    assert torch.equal(out, predict(base, latents, torch.tensor([3.0, 700.0]), cond))
    assert not torch.equal(out, predict(base, latents, torch.tensor([3.5, 700.0]), cond))
    half = load_base(str(tiny), dtype=torch.bfloat16)
    assert predict(half, latents, torch.tensor([3, 700]), cond).dtype == torch.bfloat16
    assert next(half.vae.parameters()).dtype == torch.float32
    assert half.fingerprint == base.fingerprint


def test_images_are_encoded_one_by_one(base: Base) -> None:
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = encode_images(base, pixels)
    assert mean.shape == std.shape == (3, 4, 8, 8)
    vae: Any = base.vae
    posterior = vae.encode(pixels[1:2]).latent_dist
    assert torch.equal(mean[1:2], posterior.mean)
    assert torch.equal(std[1:2], posterior.std)


def test_tokens(base: Base, tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    assert token_split(tokenizer, "sks") == token_split(base, "sks") == ["sks"]
    assert token_split(tokenizer, "a Zebra!") == ["a", "z", "e", "b", "r", "a", "!"]
    assert cut_tokens(tokenizer, "dog " * 75) == []
    assert cut_tokens(base, "dog " * 75 + "a red cat") == ["a", "red", "cat"]


def test_the_fingerprint_follows_meaning_not_place(tiny: Path, copy: Path) -> None:
    fingerprint = fingerprint_base(tiny)
    assert len(fingerprint) == 64
    assert fingerprint_base(copy) == fingerprint
    _edit_json(copy / "unet/config.json", _diffusers_version="9.9", _name_or_path="elsewhere")
    _edit_json(copy / "text_encoder/config.json", transformers_version="9", dtype="float16")
    _edit_weights(copy / UNET, lambda state: dict(reversed(state.items())))
    assert fingerprint_base(copy) == fingerprint


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_the_fingerprint_sees_every_part(tiny: Path, copy: Path, part: str) -> None:
    before = fingerprint_base(copy)
    assert before == fingerprint_base(tiny)
    if part == "scheduler":
        _edit_json(copy / "scheduler/scheduler_config.json", beta_end=0.013)
    elif part == "tokenizer":
        (file,) = [f for f in (copy / part).iterdir() if f.name in ("tokenizer.json", "vocab.json")]
        file.write_text(file.read_text().replace("beach", "peach"))
    else:
        (file,) = (copy / part).glob("*.safetensors")

        def nudge(state: dict[str, Any]) -> dict[str, Any]:
            name = max(state)
            state[name].view(-1)[0] += 1e-3
            return state

        _edit_weights(file, nudge)
    assert fingerprint_base(copy) != before


def test_another_seed_is_another_base(tiny: Path, tmp_path: Path) -> None:
    assert fingerprint_base(write_tiny_base(tmp_path / "b", seed=1)) != fingerprint_base(tiny)
    assert fingerprint_base(write_tiny_base(tmp_path / "c", seed=0)) == fingerprint_base(tiny)


def _drop(path: str) -> Callable[[Path], None]:
    return lambda base: (base / path).unlink()


def _pickled(base: Path) -> None:
    (base / UNET).rename(base / "unet/diffusion_pytorch_model.bin")


def _lacking_a_tensor(path: str) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        _edit_weights(base / path, lambda state: dict(list(state.items())[1:]))

    return change


def _with_a_tensor_too_many(path: str) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        _edit_weights(base / path, lambda state: {**state, "foreign.weight": torch.ones(1)})

    return change


def _cut_short(base: Path) -> None:
    content = (base / UNET).read_bytes()
    (base / UNET).write_bytes(content[: len(content) // 2])


def _set(path: str, **values: Any) -> Callable[[Path], None]:
    return lambda base: _edit_json(base / path, **values)


def _garbled(base: Path) -> None:
    (base / "unet/config.json").write_text("{")


def _unbounded(base: Path) -> None:
    path = base / "tokenizer/tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["model_max_length"]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("model_index.json"), "not a base in diffusers' layout"),
        (_drop(UNET), "lacks the weights of unet"),
        (_drop("vae/config.json"), "lacks vae/config.json"),
        (_drop("scheduler/scheduler_config.json"), "lacks scheduler/scheduler_config.json"),
        (_drop("tokenizer/tokenizer.json"), "has no vocabulary"),
        (_pickled, "pickle, which runs code"),
        (_lacking_a_tensor(UNET), "unet"),
        (_lacking_a_tensor("vae/diffusion_pytorch_model.safetensors"), "vae"),
        (_lacking_a_tensor(TEXT), "text_encoder lacks tensors"),
        (_with_a_tensor_too_many(UNET), "unet has unknown tensors.*foreign"),
        (_with_a_tensor_too_many(TEXT), "text_encoder has unknown tensors.*foreign"),
        (_cut_short, "cut short or damaged"),
        (_garbled, "is not JSON"),
        (_unbounded, "how many tokens fit"),
        (
            _set("model_index.json", _class_name="FluxPipeline"),
            "this version trains Stable Diffusion 1.x and 2.x .* and Stable Diffusion XL",
        ),
        (
            _set("model_index.json", _class_name="StableDiffusionXLPipeline"),
            "lacks the weights of text_encoder_2",
        ),
        (
            _set("scheduler/scheduler_config.json", prediction_type="flow"),
            "prediction type is not known: found 'flow'",
        ),
        (_set("unet/config.json", in_channels=9), "unet"),
    ],
)
def test_what_cannot_be_used_is_refused(
    copy: Path, change: Callable[[Path], None], message: str
) -> None:
    change(copy)
    with pytest.raises(BaseModelError, match=message):
        load_base(str(copy))


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("nowhere/to/be/found", None, "no base is called"),
        ("./nowhere", None, "no base is called"),
        ("someone/some-base", None, "must be pinned to a commit"),
        ("someone/some-base", "main", "must be pinned to a commit"),
    ],
)
def test_unknown_sources_are_refused(source: str, revision: str | None, message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        resolve_base(source, revision)


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match="the Hub did not give someone/some-base"):
        resolve_base("someone/some-base", "0" * 40)


def test_a_revision_of_a_folder_is_refused(tiny: Path) -> None:
    with pytest.raises(BaseModelError, match="no effect on a folder"):
        resolve_base(str(tiny), "0" * 40)


def test_the_tiny_base_is_a_pipeline_that_listens_to_its_prompt(tiny: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = [
        pipe(prompt, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images[0]
        for prompt in ("a dog", "a red cat in the snow")
    ]
    first, second = (np.asarray(image, float) for image in images)
    assert first.std() > 10
    assert np.abs(first - second).mean() > 2


def test_a_short_name_means_a_file_of_configs_base() -> None:
    with pytest.raises(BaseModelError, match="stable-diffusion-v1-5/stable-diffusion-v1-5"):
        resolve_base("sd15")
    with pytest.raises(BaseModelError, match=r"sd15\.yaml pins one"):
        resolve_base("sd15", "0" * 40)
    with pytest.raises(BaseModelError, match="no base is called 'sd99'"):
        resolve_base("sd99")
