"""What goes wrong for one order and leaves the others alone."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from raybooth.errors import ServingError
from raybooth.model.base import Base
from raybooth.model.sampler import SampleRequest
from raybooth.store import Store
from raybooth_serving.engine.loader import HostAdapter, adapter_name
from raybooth_serving.engine.loop import Engine
from raybooth_serving.engine.orders import Finished, GeneratedImage
from raybooth_serving.errors import DeadlineError
from tests.raybooth_serving.conftest import SUBJECTS
from tests.raybooth_serving.engines import alone, config, order, run

LONG = SampleRequest("a", num_inference_steps=900)


def test_what_cannot_be_ready_in_time_is_refused_at_once(base: Base, store: Store) -> None:
    long = order(None, LONG)

    async def act(engine: Engine) -> DeadlineError:
        await engine.generate(order(None, SampleRequest("a", num_inference_steps=6)))
        steps = engine.metrics.denoise_steps
        with pytest.raises(DeadlineError) as late:
            await engine.generate(replace(long, deadline=time.monotonic() + 0.1))
        assert engine.metrics.denoise_steps == steps
        assert engine.metrics.images_refused == 1
        return late.value

    assert "0.1 s left" in str(run(base, store, config(), act))


def test_what_is_past_its_deadline_leaves_the_batch(base: Base, store: Store) -> None:
    long = order(store.fetch("dog-a"), LONG)

    async def act(engine: Engine) -> dict[str, float]:
        with pytest.raises(DeadlineError):  # nothing is measured yet: it is not refused
            await engine.generate(replace(long, deadline=time.monotonic() + 0.3))
        await engine.generate(
            order(store.fetch("dog-b"), SampleRequest("a", num_inference_steps=2))
        )
        assert all(resident.num_pins == 0 for resident in engine.slots.residents)
        return engine.snapshot()

    counted = run(base, store, config(num_slots=1), act)
    assert counted["denoise_steps"] < 900
    assert counted["images_running"] == counted["images_waiting"] == 0


def test_where_memory_runs_out_steps_get_narrower(base: Base, store: Store) -> None:
    """A device that holds four rows of the usual size: wide steps are split, large images fail."""
    small = SampleRequest("a dog", num_inference_steps=4)
    large = replace(small, height=64, width=64)

    def limited(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0][:, 0].numel() > 4 * 64:
            raise torch.OutOfMemoryError("the device is full")

    async def act(engine: Engine) -> tuple[list[list[GeneratedImage] | BaseException], int, int]:
        jobs = [(subject, small) for subject in SUBJECTS] + [("dog-a", large)]
        calls = [engine.generate(order(store.fetch(subject), job)) for subject, job in jobs]
        found = await asyncio.gather(*calls, return_exceptions=True)
        engine.check_health()
        return found, engine.metrics.steps_out_of_memory, engine.profile.row_limit(64)

    hook = base.denoiser.register_forward_pre_hook(limited)
    *images, failed = run(base, store, config(buckets=(2, 4, 8)), act)[0]
    hook.remove()
    assert isinstance(failed, ServingError)
    assert "does not fit the memory" in str(failed)
    for subject, image in zip(SUBJECTS, images, strict=True):
        assert isinstance(image, list)
        assert image[0].picture == alone(base, store.fetch(subject), store, small)
        assert max(bucket for bucket, _ in image[0].finished.buckets) <= 4


def test_a_picture_that_does_not_fit_the_memory_fails_alone(base: Base, store: Store) -> None:
    small = SampleRequest("a dog", num_inference_steps=2)

    def limited(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0][:, 0].numel() > 64:
            raise torch.OutOfMemoryError("the device is full")

    async def act(engine: Engine) -> list[list[GeneratedImage] | BaseException]:
        jobs = (small, replace(small, height=64, width=64))
        calls = [engine.generate(order(None, job)) for job in jobs]
        return await asyncio.gather(*calls, return_exceptions=True)

    hook = base.vae.get_submodule("decoder").register_forward_pre_hook(limited)
    drawn, failed = run(base, store, config(), act)
    hook.remove()
    assert isinstance(drawn, list)
    assert isinstance(failed, ServingError)
    assert "16x16 latents" in str(failed)


@pytest.mark.parametrize("error", [ServingError("no room for the picture"), KeyError("a bug")])
def test_an_encoding_that_fails_fails_its_own_order_alone(
    base: Base, store: Store, error: Exception
) -> None:
    def fail(image: Image.Image, finished: Finished) -> bytes:
        raise error

    async def act(engine: Engine) -> list[GeneratedImage]:
        sample = SampleRequest("a", num_inference_steps=2)
        with pytest.raises(type(error)):
            await engine.generate(replace(order(None, sample), encode=fail))
        return await engine.generate(order(None, sample))

    assert len(run(base, store, config(), act)) == 1


def test_a_store_read_that_hangs_holds_up_nobody_else(base: Base, store: Store) -> None:
    sample = SampleRequest("a dog", num_inference_steps=2)
    record, gate = store.fetch("dog-b"), threading.Event()

    async def act(engine: Engine) -> int:
        await engine.generate(order(store.fetch("dog-a"), sample))

        def hang() -> HostAdapter:
            gate.wait()
            return engine.loader._read(record)

        reading = asyncio.to_thread(engine.loader._shelf.get, adapter_name(record), hang)
        hung = [asyncio.create_task(reading)]  # as if the store had stopped to answer
        await asyncio.sleep(0.05)
        calls = [asyncio.create_task(engine.generate(order(record, sample))) for _ in range(12)]
        for held in (store.fetch("dog-a"), None):
            assert len(await engine.generate(order(held, sample))) == 1
        assert not any(call.done() for call in calls)
        gate.set()
        return len(await asyncio.gather(*calls, *hung))

    assert run(base, store, config(), act) == 13
