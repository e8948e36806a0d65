"""Weights of a full fine-tune: saved classic, loaded exactly, exported as a pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from tests.tiny import write_tiny_base

from raybooth.errors import BaseModelError, InputError
from raybooth.model.base import Base, load_base
from raybooth.model.full_weights import load_full, save_full, trained_parts, write_pipeline
from raybooth.model.sampler import SampleRequest, generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


def moved(folder: Path) -> Base:
    """The base with every weight of denoiser and text encoder moved."""
    base = load_base(str(folder))
    generator = torch.Generator().manual_seed(7)
    for part in trained_parts(base, text_encoder=True).values():
        for parameter in part.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return base


def save_all(base: Base, folder: Path) -> dict[str, Path]:
    folder.mkdir()
    parts = trained_parts(base, text_encoder=True)
    return save_full(folder, {name: module.state_dict() for name, module in parts.items()})


def test_saved_weights_come_back_bit_for_bit_under_classic_names(
    folder: Path, tmp_path: Path
) -> None:
    trained = moved(folder)
    files = save_all(trained, tmp_path / "weights")
    assert set(files) == {"unet.safetensors", "text_encoder.safetensors"}
    assert all(
        key.startswith("text_model.") for key in load_file(files["text_encoder.safetensors"])
    )
    fresh = load_base(str(folder))
    load_full(fresh, tmp_path / "weights", ("unet", "text_encoder"))
    for part, module in trained_parts(fresh, text_encoder=True).items():
        expected = trained_parts(trained, text_encoder=True)[part].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())


def test_the_pipeline_folder_is_what_diffusers_loads_and_draws_alike(
    folder: Path, tmp_path: Path
) -> None:
    trained = moved(folder)
    save_all(trained, tmp_path / "weights")
    write_pipeline(folder, tmp_path / "weights", tmp_path / "out")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    for part in ("unet", "text_encoder"):
        found = getattr(pipeline, part).state_dict()
        expected = trained_parts(trained, text_encoder=True)[part].state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
    request = SampleRequest(prompt="a photo of sks dog", seed=3, num_inference_steps=3)
    ours = generate(load_base(str(tmp_path / "out")), None, [request])[0]
    assert ours.tobytes() == generate(trained, None, [request])[0].tobytes()
    assert ours.tobytes() != generate(load_base(str(folder)), None, [request])[0].tobytes()
    with pytest.raises(InputError, match="exists"):
        write_pipeline(folder, tmp_path / "weights", tmp_path / "out")


def test_wrong_and_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    trained = moved(folder)
    files = save_all(trained, tmp_path / "weights")
    path = files["unet.safetensors"]
    state = load_file(path)
    dropped = {key: value for key, value in state.items() if key != "conv_in.bias"}
    save_full(tmp_path / "weights", {"unet": dropped})
    with pytest.raises(BaseModelError, match="does not fit"):
        load_full(load_base(str(folder)), tmp_path / "weights", ("unet",))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BaseModelError, match="cannot be read"):
        write_pipeline(folder, tmp_path / "weights", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(BaseModelError, match="no part vae"):
        load_full(trained, tmp_path / "weights", ("vae",))
