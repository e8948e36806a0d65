"""Images of a mixed batch that moves, drawn again alone from their receipts: bit for bit."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raybooth.cli import main
from raybooth.config import EngineConfig, PicturesConfig, ServeConfig, ServedBase
from raybooth.errors import BaseModelError, InputError, NotPublishedError, StoreError
from raybooth.model.base import Base
from raybooth.store import Store
from raybooth_serving.pictures.files import open_picture, read_receipt
from raybooth_serving.pictures.fingerprint import fingerprint_engine
from raybooth_serving.pictures.receipt import Receipt
from raybooth_serving.pictures.replay import compare, redraw
from raybooth_serving.scale.full import load_full_service
from raybooth_serving.service import Service
from raybooth_serving.wire.api import ImageData, ImagesRequest
from raybooth_serving.wire.caller import Caller
from tests.raybooth_serving.conftest import SUBJECTS
from tests.raybooth_serving.published import publish, publish_full

SERVED = ServedBase(engine=EngineConfig(num_slots=3, max_rank=4, row_buckets=(1, 2, 4, 8, 16)))
PROMPT = "a photo of sks dog on the beach"


def ask(**values: Any) -> ImagesRequest:
    return ImagesRequest(**{"model": "dog-a", "prompt": PROMPT, **values})


def draw(
    base: Base, store: Store, requests: list[ImagesRequest], pictures: PicturesConfig | None = None
) -> list[ImageData]:
    """The images of `requests`, each sent a little after the one before."""

    async def run() -> list[ImageData]:
        config = ServeConfig(bases=(SERVED,), pictures=pictures or PicturesConfig())
        service = Service(base, store, config, SERVED)

        async def send(place: int, request: ImagesRequest) -> list[ImageData]:
            await asyncio.sleep(0.02 * place)
            return (await service.generate(request, Caller())).data

        try:
            sent = (send(place, request) for place, request in enumerate(requests))
            return [image for images in await asyncio.gather(*sent) for image in images]
        finally:
            await service.engine.close()

    return asyncio.run(run())


def file_of(image: ImageData) -> bytes:
    assert image.b64_json is not None
    return base64.b64decode(image.b64_json)


@pytest.fixture(scope="module")
def drawn(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[ImageData]]:
    """A batch of all subjects and the base: steps, solvers, guidance, sizes and formats differ."""
    store = Store(tmp_path_factory.mktemp("home") / "models")
    for seed, subject_id in enumerate(SUBJECTS):
        publish(store, base, subject_id, seed, rank=1 + seed)
    requests = [
        ask(num_inference_steps=12, n=2, seed=1),
        ask(model="dog-b", num_inference_steps=7, solver="euler", guidance_scale=0.0),
        ask(model="robot-c", num_inference_steps=9, solver="ddim", negative_prompt="red"),
        ask(model="tiny", num_inference_steps=5, output_format="webp", output_compression=60),
        ask(model="vase-d@1", num_inference_steps=8, adapter_scale=0.5, size="16x32", n=2),
        ask(model="dog-b", num_inference_steps=6, output_format="jpeg", deterministic=True),
    ]
    return store, draw(base, store, requests)


def test_a_moving_mixed_batch_replays_bit_for_bit(
    base: Base, drawn: tuple[Store, list[ImageData]]
) -> None:
    store, images = drawn
    here = fingerprint_engine(base, SERVED.engine)
    assert any(len(image.receipt.buckets) > 1 for image in images), "the batch did not move"
    for image in images:
        again = redraw(base, store, image.receipt)
        report = compare(again, image.receipt, here, file_of(image))
        assert report.equal, image.receipt
        assert report.max_level_difference == 0
        assert report.engine_differences == {}


def test_the_file_holds_the_receipt_of_the_answer(
    drawn: tuple[Store, list[ImageData]], tmp_path: Path
) -> None:
    for image in drawn[1]:
        (tmp_path / "picture").write_bytes(file_of(image))
        assert read_receipt(tmp_path / "picture") == image.receipt


def test_deterministic_pins_the_smallest_bucket(drawn: tuple[Store, list[ImageData]]) -> None:
    receipt = drawn[1][-1].receipt
    assert len(receipt.buckets) == 1
    assert receipt.buckets[0][1] == 6


def test_deterministic_is_the_same_file_in_any_company(
    base: Base, drawn: tuple[Store, list[ImageData]]
) -> None:
    store, images = drawn
    seed = images[-1].seed
    alone = ask(
        model="dog-b", num_inference_steps=6, output_format="jpeg", deterministic=True, seed=seed
    )
    assert file_of(draw(base, store, [alone])[0]) == file_of(images[-1])


def test_another_image_is_told_with_its_difference(
    base: Base, drawn: tuple[Store, list[ImageData]]
) -> None:
    store, images = drawn
    receipt = images[0].receipt.model_copy(update={"seed": 99})
    here = fingerprint_engine(base, SERVED.engine).model_copy(update={"torch": "1.0"})
    report = compare(redraw(base, store, receipt), receipt, here, file_of(images[0]))
    assert not report.equal
    assert report.max_level_difference is not None
    assert report.max_level_difference > 0
    told = report.sentence()
    assert f"at most {report.max_level_difference} of 255 levels" in told
    assert "torch was" in told
    assert "is 1.0" in told


def _another_base(receipt: Receipt) -> Receipt:
    used = receipt.base.model_copy(update={"fingerprint": "0" * 64})
    return receipt.model_copy(update={"base": used})


def _another_adapter(receipt: Receipt) -> Receipt:
    used = receipt.adapters[0].model_copy(update={"sha256": {"weights": "0" * 64}})
    return receipt.model_copy(update={"adapters": (used,)})


def _a_lost_adapter(receipt: Receipt) -> Receipt:
    used = receipt.adapters[0].model_copy(update={"reference": "dog-a@7"})
    return receipt.model_copy(update={"adapters": (used,)})


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (_another_base, BaseModelError, "another base"),
        (_another_adapter, StoreError, "not what the image was drawn with"),
        (_a_lost_adapter, NotPublishedError, "no version '7'"),
        (Receipt.without_prompts, InputError, "keeps no prompts"),
        (lambda r: r.model_copy(update={"prompt": "x"}), InputError, "have been changed"),
    ],
)
def test_what_cannot_be_drawn_again(
    base: Base,
    drawn: tuple[Store, list[ImageData]],
    change: Callable[[Receipt], Receipt],
    error: type[Exception],
    told: str,
) -> None:
    store, images = drawn
    with pytest.raises(error, match=told):
        redraw(base, store, change(images[0].receipt))


def test_a_file_may_keep_no_prompts(base: Base, store: Store, tmp_path: Path) -> None:
    (image,) = draw(base, store, [ask(num_inference_steps=1)], PicturesConfig(keep_prompt=False))
    assert b"beach" not in file_of(image)
    assert image.receipt.prompt == PROMPT
    (tmp_path / "picture").write_bytes(file_of(image))
    assert read_receipt(tmp_path / "picture") == image.receipt.without_prompts()


def test_the_command(
    drawn: tuple[Store, list[ImageData]],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, images = drawn
    monkeypatch.setenv("RAYBOOTH_HOME", str(store.root.parent))
    picture, receipt, out = (tmp_path / name for name in ("a.png", "a.json", "out.png"))
    picture.write_bytes(file_of(images[0]))
    receipt.write_text(images[1].receipt.json_text())
    base = ["--base", str(tiny_folder)]
    assert main(["replay", str(picture), *base, "-o", str(out)]) == 0
    assert capsys.readouterr().out == "the same image, bit for bit\n"
    assert open_picture(out.read_bytes()).tobytes() == open_picture(file_of(images[0])).tobytes()
    assert main(["replay", str(receipt), *base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_level_difference"] is None
    changed = images[1].receipt.model_copy(update={"guidance_scale": 3.0})
    receipt.write_text(changed.json_text())
    assert main(["replay", str(receipt), *base]) == 1
    assert "another image: though the engine" in capsys.readouterr().out
    assert main(["replay", str(tmp_path / "none.png")]) == 2


def test_a_full_fine_tune_replays_too(
    store: Store,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAYBOOTH_HOME", str(store.root.parent))
    publish_full(store, tiny_folder, "fox", 5)
    config = ServeConfig(bases=(SERVED,))
    served = SERVED.model_copy(update={"base": str(tiny_folder)})

    async def run() -> ImageData:
        service = load_full_service(config, served, store, "fox@1")
        request = ask(model="fox@1", num_inference_steps=3)
        (image,) = (await service.generate(request, Caller())).data
        await service.engine.close()
        return image

    image = asyncio.run(run())
    assert image.receipt.base.name == "fox@1"
    (tmp_path / "fox.png").write_bytes(file_of(image))
    assert main(["replay", str(tmp_path / "fox.png"), "--base", str(tiny_folder)]) == 0
    assert capsys.readouterr().out == "the same image, bit for bit\n"
