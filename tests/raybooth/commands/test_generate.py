"""`raybooth generate` draws what the server draws, and refuses before it works."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.raybooth_serving.published import publish, weights_of
from tests.tiny import write_tiny_base

from raybooth.cli import main
from raybooth.config import EngineConfig, ServeConfig, ServedBase
from raybooth.home import store_folder
from raybooth.model.base import Base, load_base
from raybooth.store import Store
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


@pytest.fixture
def store(base: Base) -> Store:
    store = Store(store_folder())
    publish(store, base, "dog-a", 0)
    publish(store, base, "dog-b", 1)
    return store


def generate(*words: str | Path) -> int:
    return main(["generate", *map(str, words)])


def pixels(picture: Path | bytes) -> np.ndarray:
    source = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    return np.asarray(Image.open(source))


def served(base: Base, store: Store, request: ImagesRequest) -> list[np.ndarray]:
    """The same request, answered by the endpoint's service."""

    async def ask() -> list[bytes]:
        served = ServedBase(engine=EngineConfig(num_slots=2))
        service = Service(base, store, ServeConfig(bases=(served,)), served)
        answer = await service.generate(request, Caller())
        await service.engine.close()
        return [base64.b64decode(each.b64_json or "") for each in answer.data]

    return [pixels(png) for png in asyncio.run(ask())]


@pytest.mark.parametrize("model", ["dog-a", "dog-b@1", "tiny"])
def test_the_picture_is_the_server_s_bit_for_bit(
    base: Base, folder: Path, store: Store, tmp_path: Path, model: str
) -> None:
    out = tmp_path / "out.png"
    words = ["--steps", "4", "--guidance", "3", "--solver", "euler", "--adapter-scale", "0.5"]
    rest = ["--seed", "9", "--negative-prompt", "red", "--size", "40x24", "--base", str(folder)]
    assert generate(model, PROMPT, *words, *rest, "-o", out) == 0
    request = ImagesRequest(
        model=model,
        prompt=PROMPT,
        negative_prompt="red",
        seed=9,
        num_inference_steps=4,
        guidance_scale=3.0,
        solver="euler",
        adapter_scale=0.5,
        size="40x24",
    )
    expected = served(base, store, request)[0]
    assert expected.shape == (24, 40, 3)
    np.testing.assert_array_equal(pixels(out), expected)


def test_several_subjects_are_the_server_s_bit_for_bit(
    base: Base, folder: Path, store: Store, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    words = ["--steps", "3", "--adapter-scale", "0.8", "--with", "dog-b@1:-0.5", "--seed", "9"]
    assert generate("dog-a", PROMPT, *words, "--base", folder, "-o", out) == 0
    both = [{"subject": "dog-a", "scale": 0.8}, {"subject": "dog-b", "scale": -0.5}]
    body = {"model": "tiny", "prompt": PROMPT, "seed": 9, "num_inference_steps": 3}
    request = ImagesRequest.model_validate({**body, "adapters": both})
    np.testing.assert_array_equal(pixels(out), served(base, store, request)[0])


def test_many_images_are_one_grid_of_seed_plus_i(
    base: Base,
    folder: Path,
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "grid.png"
    words = ["--steps", "3", "--seed", "5", "-n", "3", "--base", folder, "-o", out]
    assert generate("dog-a", PROMPT, *words) == 0
    assert "3 images, 2 by 2, seeds 5 to 7" in capsys.readouterr().out
    grid = pixels(out)
    assert grid.shape == (64, 64, 3)
    request = ImagesRequest(model="dog-a", prompt=PROMPT, seed=5, n=3, num_inference_steps=3)
    first, second, third = served(base, store, request)
    np.testing.assert_array_equal(grid[:32, :32], first)
    np.testing.assert_array_equal(grid[:32, 32:], second)
    np.testing.assert_array_equal(grid[32:, :32], third)
    assert (grid[32:, 32:] == 255).all()


def test_a_drawn_seed_is_told_and_gives_the_picture_again(
    folder: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["dog-a", PROMPT, "--steps", "2", "--base", folder, "-o"]
    assert generate(*words, tmp_path / "a.png") == 0
    seed = capsys.readouterr().out.split("seed ")[1].strip()
    assert generate(*words, tmp_path / "b.png", "--seed", seed) == 0
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["dgo-a", PROMPT], "did you mean dog-a, dog-b?"),
        (["dog-a@7", PROMPT], "has no version '7'"),
        (["dog-a", "dog " * 80], "these tokens would be cut"),
        (["dog-a", PROMPT, "--negative-prompt", "dog " * 80], "these tokens would be cut"),
        (["dog-a", PROMPT, "--size", "33x32"], "33x32"),
        (["dog-a", PROMPT, "--size", "big"], "--size is not understood"),
        (["dog-a", PROMPT, "-n", "0"], "-n is out of range"),
        (["dog-a", PROMPT, "--seed", "-1"], "--seed is out of range"),
        (["dog-a", PROMPT, "--seed", str(2**63)], "--seed is out of range"),
        (["dog-a", PROMPT, "--guidance", "nan"], "--guidance is out of range"),
        (["dog-a", PROMPT, "--guidance", "-1"], "--guidance is out of range"),
        (["dog-a", PROMPT, "--adapter-scale", "inf"], "--adapter-scale is out of range"),
        (["dog-a", PROMPT, "--steps", "0"], "steps"),
        (["dog-a", PROMPT, "--steps", "100000"], "steps"),
        (["dog-a", PROMPT, "-o", "nowhere/out.png"], "-o cannot be written"),
        (["dog-a", PROMPT, "-o", "out.txt"], "-o names no picture format"),
        (["stranger", PROMPT], "trained on another base"),
        (["dog-a", PROMPT, "--with", "stranger"], "trained on another base"),
        (["dog-a", PROMPT, "--with", "dgo-b:0.5"], "did you mean"),
        (["tiny", PROMPT, "--with", "dog-a"], "--with puts adapters together"),
    ],
)
def test_what_cannot_be_made_is_refused(
    base: Base,
    folder: Path,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    publish(store, base, "stranger", 3, fingerprint="0" * 64)
    before = sorted(tmp_path.iterdir())
    assert generate(*words, "--base", folder) == 2
    assert told in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("other", ["dog-b:x", ":0.5", "dog-b:inf", "dog-b:"])
def test_another_subject_is_written_with_its_scale(
    capsys: pytest.CaptureFixture[str], other: str
) -> None:
    with pytest.raises(SystemExit):
        generate("dog-a", PROMPT, "--with", other)
    assert "is not SUBJECT or SUBJECT:SCALE" in capsys.readouterr().err


def test_a_damaged_adapter_is_not_drawn(
    folder: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    path = weights_of(store, store.fetch("dog-a"))
    path.write_bytes(path.read_bytes()[:-1])
    assert generate("dog-a", PROMPT, "--base", folder) == 1
    assert "dog-a@1 is damaged" in capsys.readouterr().err
