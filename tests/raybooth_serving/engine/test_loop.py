"""Equivalence 4 through the engine: an image from a moving mixed batch = the image alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raybooth.errors import BaseModelError, RequestError, ServingError, StoreError
from raybooth.model.base import Base, load_base
from raybooth.model.lora import LoraPair
from raybooth.model.sampler import SampleRequest
from raybooth.store import Store
from raybooth_serving.engine.loop import Engine
from raybooth_serving.engine.orders import GeneratedImage
from raybooth_serving.errors import QueueFullError
from tests.raybooth_serving.conftest import SUBJECTS
from tests.raybooth_serving.engines import alone, config, order, pixels, run, together
from tests.raybooth_serving.published import publish, random_adapter, weights_of
from tests.tiny import write_tiny_sdxl

MIXED = (
    ("dog-a", SampleRequest("a photo of sks dog", seed=1, num_inference_steps=6, solver="ddim")),
    ("dog-b", SampleRequest("a red dog", seed=2, num_inference_steps=9, guidance_scale=3.0)),
    ("robot-c", SampleRequest("robot on the beach", "snow", 3, 4, solver="euler")),
    ("vase-d", SampleRequest("vase", seed=4, num_inference_steps=7, adapter_scale=0.5)),
    (None, SampleRequest("a photo of a cat", seed=5, num_inference_steps=5)),
    ("dog-a", SampleRequest("sks dog in snow", seed=6, num_inference_steps=3, guidance_scale=1.0)),
    ("dog-b", SampleRequest("a dog", seed=7, num_inference_steps=4, height=16, width=24)),
)


@pytest.mark.parametrize("gap", [0, 2])
def test_each_image_of_a_moving_mixed_batch_is_the_image_alone(
    base: Base, store: Store, gap: int
) -> None:
    found = run(base, store, config(), lambda engine: together(engine, store, MIXED, gap))
    for (subject, request), png in zip(MIXED, found, strict=True):
        record = None if subject is None else store.fetch(subject)
        assert png == alone(base, record, store, request), (subject, request)


def test_across_buckets_images_differ_by_rounding_only(base: Base, store: Store) -> None:
    buckets = config(buckets=(1, 2, 8))
    found = run(base, store, buckets, lambda engine: together(engine, store, MIXED, 1))
    for (subject, request), png in zip(MIXED, found, strict=True):
        record = None if subject is None else store.fetch(subject)
        expected = pixels(alone(base, record, store, request))
        assert np.abs(pixels(png) - expected).max() <= 1, (subject, request)


def test_subjects_really_share_denoise_steps(base: Base, store: Store) -> None:
    async def act(engine: Engine) -> dict[str, float]:
        request = SampleRequest("a dog", num_inference_steps=8)
        await together(engine, store, [(subject, request) for subject in SUBJECTS])
        return engine.snapshot()

    counted = run(base, store, config(), act)
    assert counted["mixed_steps"] > 0
    assert counted["denoised_rows"] == 64  # two of each image
    assert counted["denoise_steps"] < 32
    assert counted["images_finished"] == 4
    assert counted["slot_loads"] == 4


def test_subjects_of_one_prompt_and_seed_differ(base: Base, store: Store) -> None:
    request = SampleRequest("a photo of sks dog", seed=1, num_inference_steps=6)
    jobs = [(None, request), *((subject, request) for subject in SUBJECTS)]
    found = run(base, store, config(), lambda engine: together(engine, store, jobs))
    assert len(set(found)) == 5


@pytest.mark.parametrize("num_slots", [1, 2])
def test_more_subjects_than_slots(base: Base, store: Store, num_slots: int) -> None:
    jobs = [
        (subject, SampleRequest("a photo of sks dog", seed=seed, num_inference_steps=3))
        for seed in range(3)
        for subject in SUBJECTS
    ]

    async def act(engine: Engine) -> tuple[list[bytes], dict[str, float]]:
        found = await together(engine, store, jobs)
        engine.slots.check_integrity()
        assert all(resident.num_pins == 0 for resident in engine.slots.residents)
        return found, engine.snapshot()

    found, counted = run(base, store, config(num_slots=num_slots), act)
    for (subject, request), png in zip(jobs, found, strict=True):
        assert png == alone(base, store.fetch(subject), store, request)
    assert counted["slot_evictions"] >= 4 - num_slots
    assert counted["host_loads"] == 4


def test_damaged_weights_fail_their_own_request_alone(base: Base, store: Store) -> None:
    path = weights_of(store, store.fetch("dog-b"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    weights_of(store, store.fetch("vase-d")).unlink()
    request = SampleRequest("a dog", num_inference_steps=4)

    async def act(engine: Engine) -> list[list[GeneratedImage] | BaseException]:
        calls = [engine.generate(order(store.fetch(subject), request)) for subject in SUBJECTS]
        failed = await asyncio.gather(*calls, return_exceptions=True)
        path.write_bytes(whole)
        assert await engine.generate(order(store.fetch("dog-b"), request))
        return failed

    found = run(base, store, config(), act)
    assert isinstance(found[1], StoreError)
    assert "dog-b@1" in str(found[1])
    assert "damaged" in str(found[1])
    assert isinstance(found[3], StoreError)
    assert "vase-d@1" in str(found[3])
    for place, subject in ((0, "dog-a"), (2, "robot-c")):
        images = found[place]
        assert isinstance(images, list)
        assert images[0].picture == alone(base, store.fetch(subject), store, request)


def test_adapters_that_do_not_fit_fail_their_own_request_alone(base: Base, store: Store) -> None:
    wide = publish(store, base, "wide", 9, rank=5)
    other = publish(store, base, "other", 9, fingerprint="0" * 64)
    foreign = random_adapter(base, 9)
    foreign["no.such.site"] = LoraPair(torch.zeros(2, 4), torch.zeros(4, 2))
    misfit = publish(store, base, "misfit", 9, tensors=foreign)
    request = SampleRequest("a dog", num_inference_steps=4)

    async def act(engine: Engine) -> list[list[GeneratedImage] | BaseException]:
        records = [store.fetch("dog-a"), wide, other, misfit, misfit]
        calls = [engine.generate(order(record, request)) for record in records]
        found = await asyncio.gather(*calls, return_exceptions=True)
        engine.slots.check_integrity()
        assert [resident.adapter[:5] for resident in engine.slots.residents] == ["dog-a"]
        return found

    found = run(base, store, config(), act)
    images = found[0]
    assert isinstance(images, list)
    assert images[0].picture == alone(base, store.fetch("dog-a"), store, request)
    assert all(isinstance(error, BaseModelError) for error in found[1:])


def test_an_adapter_of_nan_fails_its_own_image_alone(base: Base, store: Store) -> None:
    broken = random_adapter(base, 9)
    name = next(iter(broken))
    broken[name] = LoraPair(broken[name].down, broken[name].up * torch.nan)
    record = publish(store, base, "nan", 9, tensors=broken)
    request = SampleRequest("a dog", num_inference_steps=4)

    async def act(engine: Engine) -> list[list[GeneratedImage] | BaseException]:
        calls = [engine.generate(order(r, request)) for r in (record, store.fetch("dog-a"))]
        return await asyncio.gather(*calls, return_exceptions=True)

    found = run(base, store, config(), act)
    assert isinstance(found[0], ServingError)
    images = found[1]
    assert isinstance(images, list)
    assert images[0].picture == alone(base, store.fetch("dog-a"), store, request)


def test_a_version_number_given_again_is_not_the_old_adapter(base: Base, store: Store) -> None:
    request = SampleRequest("a dog", num_inference_steps=4)

    async def act(engine: Engine) -> tuple[bytes, bytes]:
        before = await engine.generate(order(store.fetch("dog-a"), request))
        store.delete("dog-a")
        publish(store, base, "dog-a", 77)
        assert store.fetch("dog-a").version == 1
        after = await engine.generate(order(store.fetch("dog-a"), request))
        return before[0].picture, after[0].picture

    before, after = run(base, store, config(), act)
    assert before != after
    assert after == alone(base, store.fetch("dog-a"), store, request)


def test_a_caller_that_leaves_takes_its_rows_out(base: Base, store: Store) -> None:
    long = SampleRequest("a dog", num_inference_steps=500)
    short = SampleRequest("a dog", num_inference_steps=4)

    async def act(engine: Engine) -> tuple[bytes, dict[str, float]]:
        leaving = asyncio.create_task(engine.generate(order(store.fetch("dog-a"), *[long] * 6)))
        while engine.metrics.denoise_steps < 2:
            await asyncio.sleep(0.001)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        images = await engine.generate(order(store.fetch("dog-b"), short))
        assert all(resident.num_pins == 0 for resident in engine.slots.residents)
        return images[0].picture, engine.snapshot()

    png, counted = run(base, store, config(), act)
    assert png == alone(base, store.fetch("dog-b"), store, short)
    assert counted["images_cancelled"] == 6
    assert counted["denoise_steps"] < 500
    assert counted["images_running"] == counted["images_waiting"] == 0


def test_a_full_queue_refuses_the_whole_request_at_once(base: Base, store: Store) -> None:
    request = SampleRequest("a dog", num_inference_steps=20)

    async def act(engine: Engine) -> QueueFullError:
        record = store.fetch("dog-a")
        first = asyncio.create_task(engine.generate(order(record, *[request] * 5)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as full:
            await engine.generate(order(record, *[request] * 2))
        assert len(await first) == 5
        assert len(await engine.generate(order(record, request))) == 1
        assert engine.metrics.images_refused == 2
        return full.value

    error = run(base, store, config(queue=6), act)
    assert 1 <= error.retry_after_s <= 120
    assert "5 of 6" in str(error)


def test_what_the_base_cannot_make_is_refused(base: Base, store: Store) -> None:
    async def act(engine: Engine) -> None:
        for request in (SampleRequest("a dog", height=18), SampleRequest("a", solver="heun")):
            with pytest.raises(RequestError):
                await engine.generate(order(None, request))
        fine = SampleRequest("a dog", num_inference_steps=2)
        assert len(await engine.generate(order(None, fine))) == 1

    run(base, store, config(), act)


def test_a_dead_loop_fails_everyone_and_its_health(base: Base, store: Store) -> None:
    request = SampleRequest("a dog", num_inference_steps=500)

    async def act(engine: Engine) -> None:
        waiting = asyncio.create_task(engine.generate(order(store.fetch("dog-a"), request)))
        while engine.metrics.denoise_steps < 2:
            await asyncio.sleep(0.001)
        engine.check_health()
        engine._tick.shutdown()  # as if the thread had died
        with pytest.raises(ServingError):
            await waiting
        with pytest.raises(ServingError):
            engine.check_health()
        with pytest.raises(ServingError):
            await engine.generate(order(None, request))

    run(base, store, config(), act)


def test_a_half_precision_bank_holds_what_the_base_computes_in(
    tiny_folder: Path, store: Store
) -> None:
    half = load_base(str(tiny_folder), dtype=torch.bfloat16)
    jobs = [(subject, replace(job, num_inference_steps=2)) for subject, job in MIXED[:4]]
    found = run(half, store, config(), lambda engine: together(engine, store, jobs))
    for (subject, request), png in zip(jobs, found, strict=True):
        assert subject is not None
        assert png == alone(half, store.fetch(subject), store, request)


def test_a_calibrated_engine_knows_its_step_time_before_the_first_order(
    base: Base, store: Store
) -> None:
    settings = config().model_copy(update={"calibrate": True})

    async def act(engine: Engine) -> float | None:
        return engine.profile.seconds(4, 64)

    assert run(base, store, settings, act)


def test_prompts_are_encoded_once(base: Base, store: Store) -> None:
    async def act(engine: Engine) -> dict[str, float]:
        request = SampleRequest("a dog", num_inference_steps=2)
        for subject in SUBJECTS:
            await engine.generate(order(store.fetch(subject), *[request] * 2))
        return engine.snapshot()

    counted = run(base, store, config(), act)
    assert counted["prompt_encodes"] == 2
    assert counted["prompt_hits"] == 14


def test_an_sdxl_base_is_served(tmp_path: Path) -> None:
    """Two text encoders, sizes of each request, zeros where no negative prompt is given."""
    base = load_base(str(write_tiny_sdxl(tmp_path / "sdxl")))
    store = Store(tmp_path / "models")
    publish(store, base, "dog-a", 0, rank=2)
    jobs = (
        ("dog-a", SampleRequest("sks dog", seed=1, num_inference_steps=3, solver="euler")),
        (None, SampleRequest("sks dog", "", 1, 4, 4.0)),
        ("dog-a", SampleRequest("", "a cat", 2, 3, 4.0, solver="ddim")),
        ("dog-a", SampleRequest("a vase", seed=3, num_inference_steps=2, height=16, width=24)),
    )
    found = run(base, store, config(), lambda engine: together(engine, store, jobs, 1))
    for (subject, request), image in zip(jobs, found, strict=True):
        record = None if subject is None else store.fetch(subject)
        assert image == alone(base, record, store, request), (subject, request)


def test_a_pinned_bucket_gives_the_same_bytes_in_any_company(base: Base, store: Store) -> None:
    sample = SampleRequest("a dog", seed=3, num_inference_steps=4)
    pinned = replace(order(store.fetch("dog-a"), sample), bucket=4)

    async def act(engine: Engine) -> list[GeneratedImage]:
        (first,) = await engine.generate(pinned)
        noise = asyncio.create_task(together(engine, store, MIXED))
        second, third = await asyncio.gather(engine.generate(pinned), engine.generate(pinned))
        await noise
        return [first, *second, *third]

    images = run(base, store, config(buckets=(2, 4, 8)), act)
    expected = alone(base, store.fetch("dog-a"), store, sample)
    assert [image.picture for image in images] == [expected] * 3
    assert {image.finished.buckets for image in images} == {((4, 4),)}


@pytest.mark.parametrize("bucket", [0, 1, 5])
def test_a_bucket_that_cannot_be_pinned_is_refused(base: Base, store: Store, bucket: int) -> None:
    guided = replace(order(None, SampleRequest("a")), bucket=bucket)
    with pytest.raises(RequestError, match="pin one from 2 to 4"):
        run(base, store, config(), lambda engine: engine.generate(guided))


def test_a_tenant_with_few_images_does_not_wait_for_one_with_many(base: Base, store: Store) -> None:
    sample = SampleRequest("a", num_inference_steps=4)
    ended: list[str] = []

    async def act(engine: Engine) -> None:
        async def ask(tenant: str) -> None:
            await engine.generate(replace(order(None, sample), tenant=tenant))
            ended.append(tenant)

        many = [asyncio.create_task(ask("many")) for _ in range(16)]
        while engine.metrics.denoise_steps < 1:
            await asyncio.sleep(0.001)
        await asyncio.gather(*(ask("few") for _ in range(2)), *many)

    run(base, store, config(), act)
    assert ended.index("few") <= 4
    assert max(place for place, tenant in enumerate(ended) if tenant == "few") <= 7
