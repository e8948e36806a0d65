"""Full fine-tunes on demand: the pictures of `raybooth generate`, few models in memory at once."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raybooth.cli import main
from raybooth.config import EngineConfig, SamplingDefaults, ServeConfig, ServedBase, ServedFull
from raybooth.errors import StoreError
from raybooth.store import Store
from raybooth_serving.errors import DeadlineError
from raybooth_serving.scale.full import FullModel, FullModels, load_full_service
from raybooth_serving.service import Service
from raybooth_serving.wire.api import ImagesRequest
from raybooth_serving.wire.caller import Caller
from tests.raybooth_serving.published import publish_full

PROMPT = "a photo of sks dog"
REX, MAX = FullModel(0, "rex@1"), FullModel(0, "max@1")


@pytest.fixture
def full_store(raybooth_home: Path, tiny_folder: Path) -> Store:
    store = Store(raybooth_home / "models")
    publish_full(store, tiny_folder, "rex", 1)
    publish_full(store, tiny_folder, "max", 2)
    return store


@pytest.fixture
def config(tiny_folder: Path) -> ServeConfig:
    served = ServedBase(
        base=str(tiny_folder),
        engine=EngineConfig(num_slots=4, max_rank=4, row_buckets=(1, 2, 4)),
        defaults=SamplingDefaults(num_inference_steps=3),
    )
    return ServeConfig(bases=(served,), full=ServedFull())


def models_of(
    config: ServeConfig, store: Store, max_models: int, timeout_s: float = 60
) -> FullModels:
    def load(model: FullModel) -> Service:
        return load_full_service(config, config.bases[model.place], store, model.reference)

    return FullModels(load, max_models, timeout_s)


async def draw(models: FullModels, model: FullModel) -> np.ndarray:
    async with models.use(model) as service:
        request = ImagesRequest(model=model.reference, prompt=PROMPT, seed=4)
        answer = await service.generate(request, Caller())
        assert answer.model == model.reference
        picture = base64.b64decode(answer.data[0].b64_json or "")
        return np.asarray(Image.open(io.BytesIO(picture)))


async def close(models: FullModels) -> None:
    for service in models.services.values():
        await service.engine.close()


def test_pictures_are_those_of_raybooth_generate(
    config: ServeConfig, full_store: Store, tiny_folder: Path, tmp_path: Path
) -> None:
    async def ask() -> list[np.ndarray]:
        models = models_of(config, full_store, 2)
        pictures = [await draw(models, REX), await draw(models, MAX), await draw(models, REX)]
        assert len(models.services) == 2
        assert models.snapshot()["images_finished"] == 3
        await close(models)
        return pictures

    rex, max_, again = asyncio.run(ask())
    words = ["--seed", "4", "--steps", "3", "-o", str(tmp_path / "a.png")]
    assert main(["generate", "rex", PROMPT, *words, "--base", str(tiny_folder)]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), rex)
    assert np.array_equal(rex, again)
    assert not np.array_equal(rex, max_)


def test_the_least_recently_used_model_leaves_and_frees_its_memory(
    config: ServeConfig, full_store: Store
) -> None:
    async def run() -> None:
        models = models_of(config, full_store, 1)
        await draw(models, REX)
        denoiser = weakref.ref(models.services[REX].base.denoiser)
        await draw(models, MAX)
        assert list(models.services) == [MAX]
        gc.collect()
        assert denoiser() is None
        assert models.snapshot()["images_finished"] == 2
        await models.forget("max")
        assert not models.services
        assert models.snapshot()["images_finished"] == 2

    asyncio.run(run())


def test_a_model_in_use_stays_and_nobody_waits_for_ever(
    config: ServeConfig, full_store: Store
) -> None:
    async def run() -> None:
        models = models_of(config, full_store, 1)
        order: list[str] = []

        async def use(model: FullModel, name: str, until: asyncio.Event | None = None) -> None:
            async with models.use(model):
                order.append(name)
                if until is not None:
                    await until.wait()
                assert model in models.services

        done = asyncio.Event()
        first = asyncio.create_task(use(REX, "rex", done))
        while not order:
            await asyncio.sleep(0.01)
        second = asyncio.create_task(use(MAX, "max"))
        await asyncio.sleep(0.05)
        third = asyncio.create_task(use(REX, "rex again"))
        await asyncio.sleep(0.05)
        assert order == ["rex"], "rex is leaving: it takes no more requests, and max waits for it"
        done.set()
        await asyncio.gather(first, second, third)
        assert order == ["rex", "max", "rex again"]
        await close(models)

    asyncio.run(run())


def test_one_load_for_all_who_ask_and_one_at_a_time(config: ServeConfig, full_store: Store) -> None:
    spans: list[tuple[float, float]] = []
    models = models_of(config, full_store, 2)
    inner = models.load

    def load(model: FullModel) -> Service:
        begun = time.monotonic()
        service = inner(model)
        spans.append((begun, time.monotonic()))
        return service

    async def run() -> None:
        models.load = load
        await asyncio.gather(*(draw(models, model) for model in (REX, MAX, REX, MAX)))
        await close(models)

    asyncio.run(run())
    (_, end), (begun, _) = sorted(spans)
    assert end <= begun


def test_damaged_weights_fail_their_own_requests(config: ServeConfig, full_store: Store) -> None:
    weights = full_store.folder("rex@1") / "unet.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")

    async def run() -> None:
        models = models_of(config, full_store, 1)
        with pytest.raises(StoreError, match="rex@1 are damaged"):
            await draw(models, REX)
        await draw(models, MAX)
        await close(models)

    asyncio.run(run())


def test_no_room_in_time_is_said(config: ServeConfig, full_store: Store) -> None:
    async def run() -> None:
        models = models_of(config, full_store, 1)
        async with models.use(REX):
            models.timeout_s = 0.1
            with pytest.raises(DeadlineError, match="could not be loaded in time"):
                await draw(models, MAX)
        models.timeout_s = 60
        await draw(models, REX)
        await close(models)

    asyncio.run(run())
