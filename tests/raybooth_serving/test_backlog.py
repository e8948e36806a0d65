"""The queue is bounded by its work too; what only the queue makes late is told to come again."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from raybooth.model.base import Base
from raybooth.model.sampler import SampleRequest
from raybooth.store import Store
from raybooth_serving.engine.loop import Engine
from raybooth_serving.errors import DeadlineError, QueueFullError
from tests.raybooth_serving.engines import config, order, run

LONG = SampleRequest("a", num_inference_steps=900, guidance_scale=1.0)
SHORT = replace(LONG, num_inference_steps=2)
STEP_S = 1.0
"""What the engine believes of a step; its own are far quicker."""


async def busy(engine: Engine) -> asyncio.Task[object]:
    """A long image in the batch, and a belief of how long it takes."""
    await engine.generate(order(None, SHORT))
    for bucket in engine.config.row_buckets:
        for _ in range(50):
            engine.profile.record(bucket, 64, STEP_S)
    return asyncio.create_task(engine.generate(order(None, LONG)))


async def leave(task: asyncio.Task[object]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_work_beyond_the_bound_is_refused(base: Base, store: Store) -> None:
    async def act(engine: Engine) -> QueueFullError:
        task = await busy(engine)
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as full:
            await engine.generate(order(None, SHORT))
        await leave(task)
        while engine.backlog_s():
            await asyncio.sleep(0.01)
        assert await engine.generate(order(None, SHORT))
        return full.value

    error = run(base, store, config().model_copy(update={"max_backlog_s": 20.0}), act)
    assert "s of denoise steps" in error.found
    assert 20 < error.retry_after_s <= 120


def test_late_for_the_queue_is_full_and_late_by_itself_is_late(base: Base, store: Store) -> None:
    async def act(engine: Engine) -> None:
        task = await busy(engine)
        await asyncio.sleep(0)
        other = replace(order(None, replace(SHORT, height=64, width=64)), tenant="other")
        for _ in range(50):
            engine.profile.record(4, 256, 4 * STEP_S)
        with pytest.raises(QueueFullError, match="try again in"):
            await engine.generate(replace(other, deadline=time.monotonic() + 10))
        with pytest.raises(DeadlineError, match="allow more time"):
            await engine.generate(replace(other, deadline=time.monotonic() + 4))
        await leave(task)

    run(base, store, config(), act)
