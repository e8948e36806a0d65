"""Each export, loaded by plain diffusers, draws what RayBooth draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, safe_open
from tests.raybooth_serving.published import publish, random_adapter
from tests.tiny import write_tiny_base

from raybooth.errors import InputError, StoreError
from raybooth.export import export_model
from raybooth.model.bank import Bank
from raybooth.model.base import Base, load_base
from raybooth.model.full_weights import save_full
from raybooth.model.lora import AdapterTensors, LoraPair, find_sites, load_adapter
from raybooth.model.sampler import SampleRequest, generate
from raybooth.store import RECORD, WEIGHTS, FullRecord, Record, Store

PROMPT = "a photo of sks dog"
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


def theirs(folder: Path, adapter: Path | None) -> Image.Image:
    """The same picture by diffusers' own pipeline."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if adapter is not None:
        pipe.load_lora_weights(adapter.parent, weight_name=adapter.name)
    generator = torch.Generator().manual_seed(REQUEST.seed)
    steps = REQUEST.num_inference_steps
    return pipe(PROMPT, num_inference_steps=steps, generator=generator).images[0]


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
    assert_alike(generate(base, None, [SampleRequest(**{**vars_of(REQUEST), "slot": 0})])[0], ours)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def vars_of(request: SampleRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__dataclass_fields__}


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
    for form, name in {
        "diffusers": "d.safetensors",
        "kohya": "k.safetensors",
        "pipeline": "p",
    }.items():
        export(store, folder, form, tmp_path / name)
    classic = theirs(folder, store.folder(record.reference) / WEIGHTS)
    denoiser = {k: p for k, p in with_text(base).items() if not k.startswith("text_encoder")}
    plain = publish(store, base, "plain", 5, tensors=denoiser)
    without = theirs(folder, store.folder(plain.reference) / WEIGHTS)
    assert np.abs(np.asarray(classic).astype(int) - np.asarray(without)).max() > 5
    assert_alike(theirs(folder, tmp_path / "k.safetensors"), classic)
    assert_alike(theirs(tmp_path / "p", None), classic)
    keys = load_file(tmp_path / "k.safetensors").keys()
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in keys


def test_a_full_run_is_a_pipeline_and_nothing_else(
    base: Base, folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    weights = {k: v + 0.01 for k, v in base.denoiser.state_dict().items()}
    (tmp_path / "full").mkdir()
    files = save_full(tmp_path / "full", {"unet": weights})
    adapter = publish(store, base, "other", 0).model_dump(
        exclude={"kind", "rank", "targets", "imported"}
    )
    full: Record = store.publish(
        FullRecord(**{**adapter, "subject_id": "rex"}, parts=("unet",)), files
    )
    export_model(full, store.folder("rex"), folder, "pipeline", tmp_path / "p", force=False)
    found = load_base(str(tmp_path / "p")).denoiser.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    with pytest.raises(InputError, match="only adapters have a kohya form"):
        export_model(full, store.folder("rex"), folder, "kohya", tmp_path / "k", force=False)
