"""`raybooth import`: what another program trained is drawn and served like our own."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.raybooth_serving.published import publish, random_adapter
from tests.tiny import write_tiny_base

from raybooth.cli import main
from raybooth.config import EngineConfig, ServeConfig, ServedBase
from raybooth.home import store_folder
from raybooth.model.base import Base, load_base
from raybooth.model.lora import LoraPair
from raybooth.store import AdapterRecord, Store
from raybooth_serving.service import Service
from raybooth_serving.wire.api import ImagesRequest
from raybooth_serving.wire.caller import Caller

PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(str(folder))


def served(base: Base, store: Store, model: str) -> np.ndarray:
    """A picture of `model` by the endpoint's service."""

    async def ask() -> bytes:
        served = ServedBase(engine=EngineConfig(num_slots=2))
        service = Service(base, store, ServeConfig(bases=(served,)), served)
        request = ImagesRequest(model=model, prompt=PROMPT, seed=4, num_inference_steps=3)
        answer = await service.generate(request, Caller())
        await service.engine.close()
        return base64.b64decode(answer.data[0].b64_json or "")

    return np.asarray(Image.open(io.BytesIO(asyncio.run(ask()))))


def test_a_kohya_file_is_published_drawn_and_served(
    base: Base, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(store_folder())
    pair = LoraPair(torch.randn(2, 32), torch.randn(32, 2))
    text = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": pair}
    publish(store, base, "rex", 0, tensors={**random_adapter(base, 0), **text})
    publish(store, base, "deaf", 0, tensors=random_adapter(base, 0))
    file = tmp_path / "civit.safetensors"
    main(["export", "rex", "--format", "kohya", "-o", str(file), "--base", str(folder)])
    capsys.readouterr()
    words = [
        "import",
        str(file),
        "--subject",
        "guest",
        "--base",
        str(folder),
        "--class-noun",
        "dog",
    ]
    words += ["--identifier", "sks", "--instance-prompt", "a photo of {identifier} {class_noun}"]
    assert main([*words, "--json"]) == 0
    record = AdapterRecord.model_validate(json.loads(capsys.readouterr().out))
    assert record.reference == "guest@1"
    assert record.instance_prompt == PROMPT
    assert record.imported is not None
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("guest@1: ")
    picture = served(base, store, "guest")
    np.testing.assert_array_equal(picture, served(base, store, "rex"))
    assert not np.array_equal(picture, served(base, store, "deaf"))
    out = tmp_path / "out.png"
    drawn = ["generate", "guest", PROMPT, "--seed", "4", "--steps", "3", "-o", str(out)]
    assert main(drawn) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(out)), picture)
    assert main(["models"]) == 0
    assert "imported" in capsys.readouterr().out


def test_bad_words_and_files_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"PK\x03\x04")
    words = ["import", str(file), "--base", str(folder), "--subject"]
    assert main([*words, "rex", "--instance-prompt", "a {word}"]) == 2
    assert "--instance-prompt cannot be used" in capsys.readouterr().err
    assert main([*words, "rex"]) == 2
    assert "is a pickle" in capsys.readouterr().err
    assert main([*words, "../rex"]) == 2
    assert "cannot be used" in capsys.readouterr().err
    assert not store_folder().exists()
