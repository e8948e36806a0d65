"""Encoders are transformers' own, read safetensors only, and refuse what cannot judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.encoders import write_tiny_encoders
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPTokenizer

from raybooth.encoders import load_clip, load_encoders, load_image_encoder
from raybooth.errors import EncoderError
from raybooth.pocket import world

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tiny_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return world.subject_photos(world.draw_instance("e"), 3, "e")


def test_embeddings_are_those_of_a_plain_batch_of_transformers(
    folders: tuple[Path, Path], images: list[Image.Image]
) -> None:
    encoders = load_encoders(*map(str, folders))
    pixels = AutoImageProcessor.from_pretrained(folders[0])(images, return_tensors="pt")
    with torch.no_grad():
        plain = AutoModel.from_pretrained(folders[0], dtype=torch.float32)(**pixels)
        clip = CLIPModel.from_pretrained(folders[1], dtype=torch.float32)
        words = CLIPTokenizer.from_pretrained(folders[1])(["a red dog"], return_tensors="pt")
        both = clip(**pixels, **words)
    cls = functional.normalize(plain.last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(encoders.image.embed(images), cls, **CLOSE)
    torch.testing.assert_close(encoders.clip.embed(images), both.image_embeds, **CLOSE)
    torch.testing.assert_close(encoders.clip.read(["a red dog"]), both.text_embeds, **CLOSE)
    assert encoders.image.patches(images).shape == (3, 2, 16, 32)


def test_a_picture_of_any_size_is_judged_alone(folders: tuple[Path, Path]) -> None:
    encoder = load_image_encoder(str(folders[0]))
    small, large = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (300, 200), "blue")
    assert torch.equal(encoder.embed([small, large])[1:], encoder.embed([large]))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("facebook/dino-vits16", "must be pinned"),
        ("facebook/dino-vits16@main", "must be pinned"),
        ("no such thing", "no encoder is called"),
        ("facebook/dino-vits16@" + "0" * 40, "the Hub did not give"),
    ],
)
def test_only_folders_and_pinned_hub_ids(source: str, says: str) -> None:
    with pytest.raises(EncoderError, match=says):
        load_image_encoder(source)


def test_each_kind_in_its_place_and_no_pickles(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="not an image encoder"):
        load_image_encoder(str(folders[1]))
    with pytest.raises(EncoderError, match="not a CLIP"):
        load_clip(str(folders[0]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    (tmp_path / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(EncoderError, match=r"no model\.safetensors"):
        load_image_encoder(str(tmp_path))


def test_a_prompt_that_would_be_cut_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(EncoderError, match="too long"):
        load_clip(str(folders[1])).read(["a robot " * 60])
