"""Each export, loaded by plain diffusers, draws what RayBooth draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.raybooth_serving.published import publish, random_adapter
from tests.tiny import write_tiny_base, write_tiny_sdxl

from raybooth.errors import InputError, StoreError
from raybooth.export import export_model
from raybooth.model.bank import Bank
from raybooth.model.base import Base, load_base
from raybooth.model.full_weights import save_full
from raybooth.model.learned import LearnedTokens, save_learned, spell_out
from raybooth.model.lora import (
    AdapterTensors,
    LoraPair,
    denoiser_part,
    find_sites,
    load_adapter,
    save_adapter,
)
from raybooth.model.sampler import SampleRequest, denoise_step, generate, row_image, start_row
from raybooth.model.text_adapter import TextAdapter
from raybooth.store import LEARNED, RECORD, WEIGHTS, FullRecord, ModelRecord, Record, Store

PROMPT = "a photo of sks dog"
FORMS = {"diffusers": "d.safetensors", "kohya": "k.safetensors", "pipeline": "p"}
REQUEST = SampleRequest(prompt=PROMPT, seed=3, num_inference_steps=4, solver="ddim", slot=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(str(folder))


@pytest.fixture(scope="module")
def store(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store"))
    publish(store, base, "rex", 0)
    return store


@pytest.fixture(scope="module")
def ours(base: Base, store: Store) -> Image.Image:
    """The picture of the published adapter, by the bank."""
    bank = Bank(
        base.denoiser,
        sites=find_sites(base.denoiser, "all"),
        rank=2,
        num_slots=1,
        device="cpu",
    )
    bank.write(1, load_adapter(store.folder("rex") / WEIGHTS))
    try:
        return generate(base, bank, [REQUEST])[0]
    finally:
        bank.detach()


def theirs(
    folder: Path, adapter: Path | None, prompt: str = PROMPT, tokens: Path | None = None
) -> Image.Image:
    """The same picture by diffusers' own pipeline."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if adapter is not None:
        pipe.load_lora_weights(adapter.parent, weight_name=adapter.name)
    if tokens is not None:
        pipe.load_textual_inversion(tokens.parent, weight_name=tokens.name)
    generator = torch.Generator().manual_seed(REQUEST.seed)
    steps = REQUEST.num_inference_steps
    guidance = REQUEST.guidance_scale
    return pipe(
        prompt, num_inference_steps=steps, guidance_scale=guidance, generator=generator
    ).images[0]


def assert_alike(one: Image.Image, other: Image.Image) -> None:
    levels = np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))
    assert levels.max() <= 1


def export(store: Store, folder: Path, form: Any, output: Path, force: bool = False) -> list[Path]:
    record = store.fetch("rex")
    return export_model(record, store.folder("rex"), folder, form, output, force=force)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_an_adapter_file_draws_the_same_picture_in_diffusers(
    form: str, store: Store, folder: Path, ours: Image.Image, tmp_path: Path
) -> None:
    written = export(store, folder, form, tmp_path / "rex.safetensors")
    assert written == [tmp_path / "rex.safetensors"]
    assert_alike(theirs(folder, written[0]), ours)
    assert np.abs(np.asarray(theirs(folder, None)).astype(int) - np.asarray(ours)).max() > 10


def test_a_pipeline_holds_the_adapter_in_its_weights(
    store: Store, folder: Path, ours: Image.Image, tmp_path: Path
) -> None:
    written = export(store, folder, "pipeline", tmp_path / "out")
    assert_alike(theirs(tmp_path / "out", None), ours)
    assert tmp_path / "out" / RECORD in written
    base = load_base(str(tmp_path / "out"))
    assert_alike(generate(base, None, [replace(REQUEST, slot=0)])[0], ours)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_is_replaced_unasked_and_only_exports_are(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "rex.safetensors", tmp_path / "out"
    for output in (file, out):
        export(store, folder, "kohya", output)
        with pytest.raises(InputError, match="exists"):
            export(store, folder, "kohya", output)
    file.write_bytes(b"old")
    export(store, folder, "diffusers", out, force=True)
    assert {path.name for path in out.iterdir()} == {WEIGHTS, RECORD}
    export(store, folder, "kohya", file, force=True)
    with safe_open(file, "pt") as reader:
        assert reader.metadata()["ss_network_dim"] == "2"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "diary.txt").write_text("dear diary")
    with pytest.raises(InputError, match="no export wrote"):
        export(store, folder, "pipeline", mine, force=True)
    with pytest.raises(InputError, match="a pipeline is a folder"):
        export(store, folder, "pipeline", tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="no folder"):
        export(store, folder, "kohya", tmp_path / "no" / "rex.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "rex.safetensors"]


def test_a_failed_export_leaves_what_was_there(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(store, folder, "diffusers", tmp_path / "out")
    before = (tmp_path / "out" / WEIGHTS).read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for form in ("diffusers", "pipeline"):
        with pytest.raises(StoreError, match="No space left"):
            export(store, folder, form, tmp_path / "out", force=True)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def with_text(base: Base) -> AdapterTensors:
    """A random adapter of some layers of the denoiser and of the text encoder."""
    tensors = {k: p for k, p in random_adapter(base, 5).items() if k.endswith(("to_q", "to_v"))}
    generator = torch.Generator().manual_seed(6)
    for layer in range(2):
        for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"):
            sizes = (64, 32) if name == "mlp.fc1" else (32, 32)
            key = f"text_encoder.text_model.encoder.layers.{layer}.{name}"
            down = torch.randn(2, sizes[1], generator=generator) * 0.3
            up = torch.randn(sizes[0], 2, generator=generator) * 0.3
            tensors[key] = LoraPair(down, up)
    return tensors


def test_text_encoders_travel_in_every_form(base: Base, folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    record = publish(store, base, "rex", 5, tensors=with_text(base))
    for form, name in FORMS.items():
        export(store, folder, form, tmp_path / name)
    ours = draw_with_text(base, with_text(base), None, PROMPT)
    classic = theirs(folder, store.folder(record.reference) / WEIGHTS)
    denoiser = {k: p for k, p in with_text(base).items() if not k.startswith("text_encoder")}
    plain = publish(store, base, "plain", 5, tensors=denoiser)
    without = theirs(folder, store.folder(plain.reference) / WEIGHTS)
    assert np.abs(np.asarray(classic).astype(int) - np.asarray(without)).max() > 5
    assert_alike(classic, ours)
    assert_alike(theirs(folder, tmp_path / "k.safetensors"), ours)
    assert_alike(theirs(tmp_path / "p", None), ours)
    keys = load_file(tmp_path / "k.safetensors").keys()
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in keys


def test_a_full_run_is_a_pipeline_and_nothing_else(
    base: Base, folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    weights = {k: v + 0.01 for k, v in base.denoiser.state_dict().items()}
    (tmp_path / "full").mkdir()
    files = save_full(tmp_path / "full", {"unet": weights})
    adapter = publish(store, base, "other", 0).model_dump(include=set(ModelRecord.model_fields))
    full: Record = store.publish(
        FullRecord(**{**adapter, "subject_id": "rex"}, parts=("unet",)), files
    )
    export_model(full, store.folder("rex"), folder, "pipeline", tmp_path / "p", force=False)
    found = load_base(str(tmp_path / "p")).denoiser.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    with pytest.raises(InputError, match="only adapters have a kohya form"):
        export_model(full, store.folder("rex"), folder, "kohya", tmp_path / "k", force=False)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_learned_tokens_travel_along(
    num_tokens: int, base: Base, folder: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(9)
    vectors = {"text_encoder": torch.randn(num_tokens, 32, generator=generator)}
    tensors = with_text(base)
    weights, tokens = tmp_path / WEIGHTS, tmp_path / LEARNED
    save_adapter(weights, tensors, 1.0)
    save_learned(tokens, LearnedTokens("<rex>", vectors))
    store = Store(tmp_path / "store")
    record = publish(store, base, "rex", 0).model_copy(update={"rank": 2})
    store.publish(record, {WEIGHTS: weights, LEARNED: tokens})
    for form, name in {"diffusers": "d", "kohya": "k", "pipeline": "p"}.items():
        export(store, folder, form, tmp_path / name)
    with pytest.raises(InputError, match="learned tokens too"):
        export(store, folder, "kohya", tmp_path / "k.safetensors")
    prompt = "a photo of <rex> dog"
    ours = draw_with_text(base, tensors, LearnedTokens("<rex>", vectors), prompt)
    assert_alike(theirs(folder, tmp_path / "d" / WEIGHTS, prompt, tmp_path / "d" / LEARNED), ours)
    embedding = load_file(tmp_path / "k" / "rex_emb.safetensors")
    assert embedding.keys() == {"emb_params"}
    (tmp_path / "k.emb").mkdir()
    save_file({"<rex>": embedding["emb_params"]}, tmp_path / "k.emb" / "e.safetensors")
    found = theirs(
        folder, tmp_path / "k" / "rex.safetensors", prompt, tmp_path / "k.emb" / "e.safetensors"
    )
    assert_alike(found, ours)
    assert_alike(theirs(tmp_path / "p", None, prompt), ours)
    whole = load_base(str(tmp_path / "p"))
    spelled = spell_out(prompt, "<rex>", num_tokens)
    request = replace(REQUEST, prompt=spelled, slot=0)
    assert_alike(generate(whole, None, [request])[0], ours)


def draw_with_text(
    base: Base,
    tensors: AdapterTensors,
    learned: LearnedTokens | None,
    prompt: str,
    *,
    zero_terminal_snr: bool = False,
) -> Image.Image:
    """Our picture where the adapter moves the text encoder too."""
    text = TextAdapter(base, tensors, *([learned] if learned else []))
    bank = Bank(
        base.denoiser,
        sites=find_sites(base.denoiser, "all"),
        rank=2,
        num_slots=1,
        device="cpu",
    )
    bank.write(1, denoiser_part(tensors))
    try:
        uncond = None if base.negative_is_zeros else text.encode("")
        request = replace(REQUEST, zero_terminal_snr=zero_terminal_snr)
        row = start_row(base, request, cond=text.encode(prompt), uncond=uncond)
        while not row.done:
            denoise_step(base, bank, [row])
        return row_image(base, row)
    finally:
        bank.detach()


def test_sdxl_and_both_its_text_encoders_travel_in_every_form(tmp_path: Path) -> None:
    folder = write_tiny_sdxl(tmp_path / "base")
    base = load_base(str(folder))
    tensors = random_adapter(base, 4)
    for part, width in {"text_encoder": 32, "text_encoder_2": 48}.items():
        for layer in ("q_proj", "out_proj"):
            down, up = torch.randn(2, 2, width, generator=torch.Generator().manual_seed(width))
            key = f"{part}.text_model.encoder.layers.0.self_attn.{layer}"
            tensors[key] = LoraPair(0.3 * down, 0.3 * up.T.contiguous())
    store = Store(tmp_path / "store")
    publish(store, base, "rex", 0, tensors=tensors)
    ours = draw_with_text(base, tensors, None, PROMPT)
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs(folder, None))).max() > 10
    for form, name in FORMS.items():
        (written, *_) = export(store, folder, form, tmp_path / name)
        if form == "pipeline":
            assert_alike(theirs(tmp_path / name, None), ours)
        else:
            assert_alike(theirs(folder, written), ours)
    names = load_file(tmp_path / FORMS["kohya"])
    assert {name.split("_")[1] for name in names} == {"unet", "te1", "te2"}
    assert any("input_blocks_3_1_transformer_blocks" in name for name in names)


def test_a_schedule_that_ends_in_noise_alone_is_the_pipelines(tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path / "base", prediction_type="v_prediction")
    base, store = load_base(str(folder)), Store(tmp_path / "store")
    record = publish(store, base, "rex", 0, tensors=with_text(base))
    trained = record.model_copy(update={"train": {"objective": {"zero_terminal_snr": True}}})
    export_model(trained, store.folder("rex"), folder, "pipeline", tmp_path / "p", force=False)
    ours = draw_with_text(base, with_text(base), None, PROMPT, zero_terminal_snr=True)
    assert_alike(theirs(tmp_path / "p", None), ours)
    export_model(record, store.folder("rex"), folder, "pipeline", tmp_path / "q", force=False)
    assert_alike(theirs(tmp_path / "q", None), draw_with_text(base, with_text(base), None, PROMPT))
