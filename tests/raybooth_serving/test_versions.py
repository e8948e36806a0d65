"""A name that moves is heard with the next request; images in flight end as they began."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raybooth.config import EngineConfig, SamplingDefaults, ServeConfig, ServedBase
from raybooth.errors import BaseModelError, NotPublishedError
from raybooth.extract import extract_adapter, extract_request, publish_extract
from raybooth.model.base import Base, load_base
from raybooth.model.lora import save_adapter
from raybooth.model.published import take_on
from raybooth.model.sampler import SampleRequest, generate
from raybooth.store import WEIGHTS, Store
from raybooth_serving.service import Service
from raybooth_serving.wire.api import ImagesRequest, ImagesResponse
from raybooth_serving.wire.caller import Caller
from tests.raybooth.model.test_extract import moved
from tests.raybooth.test_extract import publish_full
from tests.raybooth_serving.published import publish, random_adapter

PROMPT = "a photo of sks dog"
SERVED = ServedBase(
    engine=EngineConfig(num_slots=3, max_rank=4, row_buckets=(4,)),
    defaults=SamplingDefaults(num_inference_steps=3),
)


async def ask(service: Service, model: str, num_inference_steps: int = 3) -> ImagesResponse:
    request = ImagesRequest(
        model=model, prompt=PROMPT, seed=1, num_inference_steps=num_inference_steps
    )
    return await service.generate(request, Caller())


def picture(answer: ImagesResponse) -> Image.Image:
    assert answer.data[0].b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).convert("RGB")


def apart(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


def serve(base: Base, store: Store, talk: Callable[[Service], Awaitable[None]]) -> None:
    async def run() -> None:
        service = Service(base, store, ServeConfig(bases=(SERVED,)), SERVED)
        try:
            await talk(service)
        finally:
            await service.engine.close()

    asyncio.run(run())


def test_promote_and_rollback_are_heard_with_the_next_request(base: Base, store: Store) -> None:
    publish(store, base, "dog-a", 17)

    async def talk(service: Service) -> None:
        first, second = [await ask(service, f"dog-a@{version}") for version in (1, 2)]
        assert apart(picture(first), picture(second)) > 10
        store.promote("dog-a@1")
        for move, expected in (
            (lambda: None, first),
            (lambda: store.promote("dog-a@2"), second),
            (lambda: store.roll_back("dog-a"), first),
        ):
            move()
            found = await ask(service, "dog-a@production")
            assert found.model == expected.model
            assert apart(picture(found), picture(expected)) == 0

    serve(base, store, talk)


def test_images_in_flight_end_on_the_version_they_began_with(base: Base, store: Store) -> None:
    publish(store, base, "dog-a", 17)
    store.promote("dog-a@1")

    async def talk(service: Service) -> None:
        alone = await ask(service, "dog-a@1", 40)
        joined = service.engine.snapshot()["images_joined"]
        slow = asyncio.create_task(ask(service, "dog-a@production", 40))
        while service.engine.snapshot()["images_joined"] == joined:
            await asyncio.sleep(0.001)
        store.promote("dog-a@2")
        store.delete("dog-a@1")
        quick = await ask(service, "dog-a@production")
        assert not slow.done()
        assert quick.model == "dog-a@2"
        answer = await slow
        assert answer.model == "dog-a@1"
        assert apart(picture(answer), picture(alone)) == 0

    serve(base, store, talk)


def test_a_preview_is_served_before_its_subject_is_published(
    base: Base, store: Store, tmp_path: Path
) -> None:
    template = publish(store, base, "template", 3)

    def checkpoint(train_step: int) -> str:
        weights = tmp_path / "weights"
        save_adapter(weights, random_adapter(base, train_step), 1.0)
        changes = {"subject_id": "mug", "job_id": "mug-1", "num_train_steps": train_step}
        record = template.model_copy(update=changes)
        return store.publish_preview(record, {WEIGHTS: weights}).reference

    async def talk(service: Service) -> None:
        first = checkpoint(100)
        cards = service.catalog.cards
        assert not any(card.id.startswith("mug") for card in cards())
        names = [card.id for card in cards(with_versions=True)]
        assert [name for name in names if name.startswith("mug")] == ["mug@preview"]
        with pytest.raises(NotPublishedError, match="mug@preview is there"):
            await ask(service, "mug")
        before = await ask(service, "mug@preview")
        assert before.model == first
        second = checkpoint(200)
        after = await ask(service, "mug@preview")
        assert after.model == second
        assert apart(picture(before), picture(after)) > 10
        again = await ask(service, first)  # the one before is still there for who began with it
        assert apart(picture(before), picture(again)) == 0
        store.drop_preview("mug", "mug-1")
        with pytest.raises(NotPublishedError):
            await ask(service, "mug@preview")

    serve(base, store, talk)


def test_a_full_fine_tune_is_served_under_its_own_name_once_extracted(
    base: Base, tiny_folder: Path, tmp_path: Path
) -> None:
    store, own = Store(tmp_path / "models"), load_base(str(tiny_folder))
    full = publish_full(store, own, {"unet": moved(own, rank=2)[0]["unet"]})

    async def talk(service: Service) -> None:
        with pytest.raises(BaseModelError, match="a full fine-tune"):
            await ask(service, "rex")
        found = extract_adapter(own, extract_request(full, rank=4), store.folder("rex"))
        publish_extract(store, *found)
        answer = await ask(service, "rex")
        assert answer.model == "rex@2"
        fresh = load_base(str(tiny_folder))
        take_on(fresh, full, store.folder("rex@1"))
        request = SampleRequest(PROMPT, seed=1, num_inference_steps=3)
        assert apart(picture(answer), generate(fresh, None, [request])[0]) <= 1

    serve(base, store, talk)
