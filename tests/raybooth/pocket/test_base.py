"""The shipped base: plain diffusers loads and samples it; its figures are the ones beside it."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from raybooth import pocket
from raybooth.pocket.pretrain import held_out
from raybooth.pocket.report import prompts
from raybooth.pocket.vae import psnr


@pytest.fixture(scope="module")
def pipeline() -> Any:
    loaded: Any = StableDiffusionPipeline.from_pretrained(pocket.path())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_plain_diffusers_loads_and_samples_it(pipeline: Any) -> None:
    def sample(seed: int) -> np.ndarray[Any, Any]:
        rng = torch.Generator().manual_seed(seed)
        out = pipeline(
            "a photo of a red robot", num_inference_steps=2, generator=rng, output_type="np"
        )
        return np.asarray(out.images[0])

    one = sample(1)
    assert one.shape == (64, 64, 3)
    assert np.isfinite(one).all()
    assert one.std() > 0.01
    assert (one == sample(1)).all()
    assert not (one == sample(2)).all()


def test_it_is_small_enough_for_a_repository() -> None:
    sizes = [file.stat().st_size for file in pocket.path().rglob("*") if file.is_file()]
    assert sum(sizes) <= 24 * 1024 * 1024


def test_weights_are_half_precision_safetensors_in_classic_names() -> None:
    files = list(pocket.path().rglob("*.safetensors"))
    assert len(files) >= 3
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert {opened.get_slice(key).get_dtype() for key in opened.keys()} == {"F16"}  # noqa: SIM118
    with safe_open(pocket.path() / "text_encoder" / "model.safetensors", framework="pt") as opened:
        assert all(key.startswith("text_model.") for key in opened.keys())  # noqa: SIM118


def test_no_config_holds_a_path_of_the_machine_that_wrote_it() -> None:
    for file in pocket.path().rglob("*.json"):
        assert file.name == "vocab.json" or '": "/' not in file.read_text()
        assert "_name_or_path" not in file.read_text()


def test_the_schedule_ends_in_pure_noise(pipeline: Any) -> None:
    config = pipeline.scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
    assert config.rescale_betas_zero_snr
    assert float(pipeline.scheduler.alphas_cumprod[-1]) < 1e-6


def test_the_autoencoder_is_as_good_on_new_pictures_as_its_record_says(pipeline: Any) -> None:
    record = json.loads((pocket.path() / "record.json").read_text())
    found = psnr(pipeline.vae, held_out(32))
    assert found == pytest.approx(record["vae_psnr_db"], abs=1.5)
    assert found >= 30.0


def test_report_and_record_agree() -> None:
    report = json.loads((pocket.path() / "report.json").read_text())
    record = json.loads((pocket.path() / "record.json").read_text())
    assert report["samples_seen"] == record["stages"]["denoiser"]["samples_seen"]
    assert report["base"]["vae_psnr_db"] == pytest.approx(record["vae_psnr_db"], abs=0.5)
    assert report["met"] == {
        name: report["base"][name] >= goal for name, goal in report["targets"].items()
    }
    assert all(report["met"].values())
    assert min(report["classifier_on_true_renders"].values()) > 0.9
    assert (pocket.path() / "samples.png").exists()


def test_prompts_ask_for_every_class_in_every_context() -> None:
    asked = {(label["class"], label["context"]) for _, label in prompts(100, 0)}
    assert len(asked) == 100
