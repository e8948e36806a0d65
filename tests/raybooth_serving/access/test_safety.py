"""diffusers' real safety checker, tiny, with thresholds that flag by colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file

from raybooth.config import SafetyConfig, ServeConfig, parse_config
from raybooth.errors import ConfigError, InputProblems
from raybooth_serving.access.safety import SafetyChecker
from raybooth_serving.errors import UnfitImageError
from tests.raybooth_serving.checker import write_tiny_checker

RED = Image.new("RGB", (40, 24), (220, 10, 10))
BLUE = Image.new("RGB", (40, 24), (10, 10, 220))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checker whose first concept is what it sees in RED."""
    return write_tiny_checker(tmp_path_factory.mktemp("checkers") / "red", flagged=RED)


def _load(folder: Path | str, **changes: Any) -> SafetyChecker:
    return SafetyChecker(SafetyConfig(checker=str(folder), **changes), "cpu")


def test_what_is_flagged_is_refused_or_black(folder: Path) -> None:
    checker = _load(folder)
    assert checker.flags(RED)
    assert not checker.flags(BLUE)
    assert checker.finished(BLUE) == (BLUE, False)
    with pytest.raises(UnfitImageError, match="refuses the image"):
        checker.finished(RED)
    blank, is_flagged = _load(folder, on_flag="blank").finished(RED)
    assert is_flagged
    assert blank.size == RED.size
    assert blank.getextrema() == ((0, 0),) * 3


def test_partial_pictures_are_looked_at_too(folder: Path) -> None:
    checker = _load(folder)
    assert checker.partial(BLUE) is BLUE
    assert checker.partial(RED).getextrema() == ((0, 0),) * 3


def test_verdicts_are_those_of_diffusers(folder: Path) -> None:
    from transformers import CLIPImageProcessor

    model = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker")
    seen = CLIPImageProcessor.from_pretrained(folder / "feature_extractor")
    images = [Image.new("RGB", (32, 32), (value, 10, 230 - value)) for value in range(0, 230, 23)]
    pixels = seen(images=images, return_tensors="pt").pixel_values
    _, expected = model(pixels, [torch.zeros(1)] * len(images))
    assert set(expected) == {True, False}
    checker = _load(folder)
    assert [checker.flags(image) for image in images] == expected


def test_a_flat_folder_with_the_names_of_older_files_is_the_same_checker(
    folder: Path, tmp_path: Path
) -> None:
    for part in ("safety_checker", "feature_extractor"):
        for path in (folder / part).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    older = {
        name.replace("vision_model.", "vision_model.vision_model.", 1): tensor
        for name, tensor in weights.items()
    }
    assert older.keys() != weights.keys()
    save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checker = _load(tmp_path)
    assert (checker.flags(RED), checker.flags(BLUE)) == (True, False)


def test_half_a_checker_would_be_random_and_is_refused(folder: Path, tmp_path: Path) -> None:
    for part in ("safety_checker", "feature_extractor"):
        for path in (folder / part).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"no whole safety checker.*visual_projection"):
        _load(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no safety checker"):
        _load(tmp_path)


@pytest.mark.parametrize("source", ["no/such", "a/b@main", "/no/such/folder", ""])
def test_what_is_no_checker(source: str) -> None:
    with pytest.raises(ConfigError, match="safety"):
        _load(source)


@pytest.mark.parametrize(
    ("safety", "told"),
    [
        ({"on_flag": "blank"}, "no effect without a checker"),
        ({"checker": "x", "on_flag": "send"}, "refuse"),
        ({"policy": "package.module"}, "package.module:callable"),
        ({"policy": "package.module:a.b()"}, "package.module:callable"),
    ],
)
def test_configs_that_cannot_be_meant(safety: dict[str, str], told: str) -> None:
    with pytest.raises(InputProblems, match=told):
        parse_config(ServeConfig, {"safety": safety}, "x.yaml")
