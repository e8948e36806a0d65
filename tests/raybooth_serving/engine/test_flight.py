"""What an image tells while it is on its way: progress, partial images, its bucket trace."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from raybooth.model.base import Base
from raybooth.model.sampler import Row, SampleRequest, denoise_step, row_image, start_row
from raybooth.store import Store
from raybooth_serving.engine.flight import Flight
from raybooth_serving.engine.loop import Engine
from raybooth_serving.engine.orders import Event, GeneratedImage, Order, Part, Partial, Progress
from raybooth_serving.engine.preparation import Ready
from tests.raybooth_serving.engines import alone, config, pixels, run


def _flight(row: Row, partial_images: int) -> Flight:
    ready = Ready(adapter=None, flat_P=None, rows=[row])
    order = Order((row.request,), partial_images=partial_images)
    return Flight(0, order, 0, row, ready, arrived=0.0)


@pytest.mark.parametrize(
    ("partial_images", "num_steps", "expected"),
    [
        (0, 8, {}),
        (1, 8, {4: 0}),
        (3, 8, {2: 0, 4: 1, 6: 2}),
        (2, 25, {8: 0, 16: 1}),
        (3, 2, {1: 0}),
        (3, 1, {}),
    ],
)
def test_partial_images_are_evenly_spaced(
    base: Base, partial_images: int, num_steps: int, expected: dict[int, int]
) -> None:
    async def act() -> dict[int, int]:
        row = start_row(base, SampleRequest("", num_inference_steps=num_steps))
        flight, found = _flight(row, partial_images), {}
        for row.index in range(1, num_steps + 1):
            index = flight.partial_index()
            if index is not None:
                found[row.index] = index
        return found

    assert asyncio.run(act()) == expected


def test_progress_and_partial_images_come_before_the_image(base: Base, store: Store) -> None:
    sample = SampleRequest("a dog", seed=1, num_inference_steps=8)
    events: list[Event | str] = []

    async def act(engine: Engine) -> list[GeneratedImage]:
        order = Order(
            (sample, SampleRequest("a cat", seed=2, num_inference_steps=3)),
            (Part(store.fetch("dog-a")),),
            partial_images=3,
            on_event=events.append,
        )
        images = await engine.generate(order)
        events.append("done")
        await asyncio.sleep(0.05)
        return images

    images = run(base, store, config(), act)
    assert events[-1] == "done"
    first = [event for event in events if not isinstance(event, str) and event.index == 0]
    assert [e for e in first if isinstance(e, Progress)] == [
        Progress(0, step, 8) for step in range(1, 9)
    ]
    partials = [event for event in first if isinstance(event, Partial)]
    assert [partial.partial_index for partial in partials] == [0, 1, 2]
    final = pixels(images[0].picture)
    apart = [np.abs(pixels(partial.picture) - final).mean() for partial in partials]
    assert apart[0] > apart[2] > 0
    short = [event for event in events if isinstance(event, Partial) and event.index == 1]
    assert [partial.partial_index for partial in short] == [0, 1]
    assert images[0].picture == alone(base, store.fetch("dog-a"), store, sample)


def test_a_partial_image_is_the_x0_prediction_of_its_step(base: Base, store: Store) -> None:
    sample = SampleRequest("a dog", seed=1, num_inference_steps=4)
    events: list[Event] = []
    order = Order((sample,), partial_images=1, on_event=events.append)
    run(base, store, config(), lambda engine: engine.generate(order))
    row = start_row(base, sample)
    for _ in range(2):
        denoise_step(base, None, [row], 4)
    row.latents_CHW = row.x0_prev_CHW
    (partial,) = [event for event in events if isinstance(event, Partial)]
    expected = np.asarray(row_image(base, row), dtype=np.int16)
    assert np.array_equal(pixels(partial.picture), expected)


def test_the_trace_tells_every_denoise_step(base: Base, store: Store) -> None:
    """Two images of 4 and 6 steps in buckets of 2 and 4: together, then one alone."""
    samples = tuple(SampleRequest("a", seed=n, num_inference_steps=n) for n in (4, 6))
    buckets = config(buckets=(2, 4))
    images = run(base, store, buckets, lambda engine: engine.generate(Order(samples)))
    assert [image.finished.buckets for image in images] == [((4, 4),), ((4, 4), (2, 2))]
    assert [image.finished.index for image in images] == [0, 1]
    assert [image.finished.seed for image in images] == [4, 6]
    assert images[0].finished.adapter is None


def test_a_listener_that_fails_does_not_stop_the_engine(base: Base, store: Store) -> None:
    def fail(event: Event) -> None:
        raise KeyError(event)

    async def act(engine: Engine) -> int:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        sample = SampleRequest("a", num_inference_steps=2)
        images = await engine.generate(Order((sample,), on_event=fail))
        engine.check_health()
        return len(images)

    assert run(base, store, config(), act) == 1
