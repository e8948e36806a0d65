"""Our engine on a clock of CPU seconds; arrivals come in while it computes."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from raybooth.config import EngineConfig
from raybooth.model.base import Base
from raybooth.model.lora import AdapterTensors
from raybooth.model.sampler import SampleRequest
from raybooth.store import Store
from raybooth_serving.engine.loop import Engine
from raybooth_serving.engine.orders import Event, Order, Part
from tests.bench.arrivals import Arrival, CpuClock, Ran, Served
from tests.bench.mix_peers import GUIDANCE, PROMPT, STEPS
from tests.raybooth_serving.published import publish


class Endpoint:
    """One engine that has been serving for a while: adapters in host memory, prompts encoded.

    Its step profile is of CPU seconds as well: by wall seconds the neighbours of this process
    would have a say in how many rows pay.
    """

    def __init__(
        self, base: Base, folder: Path, adapters: Sequence[AdapterTensors], config: EngineConfig
    ) -> None:
        store = Store(folder)
        rank = config.max_rank
        self.parts = [
            Part(publish(store, base, f"subject-{index}", index, rank=rank, tensors=adapter))
            for index, adapter in enumerate(adapters)
        ]
        self._cpu = patch(
            "raybooth_serving.engine.timing.time", SimpleNamespace(perf_counter=time.thread_time)
        )
        self._cpu.start()
        self.runner = asyncio.Runner()
        self.engine = self.runner.run(_started(base, store, config))
        for part in self.parts:
            adapter = self.engine.loader.load((part,))
            for prompt in (PROMPT, ""):
                self.engine.prompts.encode(prompt, adapter)

    def close(self) -> None:
        """Take the bank off the base."""
        self.runner.run(self.engine.close())
        self.runner.close()
        self._cpu.stop()


class Ours:
    """Requests to the endpoint; `plain`: all ask for the base (the ceiling)."""

    def __init__(self, endpoint: Endpoint, *, plain: bool = False) -> None:
        self.name = "RayBooth, plain base (the ceiling)" if plain else "RayBooth"
        self.endpoint = endpoint
        self.plain = plain
        self._woken = asyncio.Event()

    def run(self, arrivals: Sequence[Arrival]) -> Ran:
        """Serve them."""
        return self.endpoint.runner.run(self._run(arrivals))

    async def _run(self, arrivals: Sequence[Arrival]) -> Ran:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGPROF, self._woken.set)
        clock, tasks = CpuClock(), list[asyncio.Task[Served]]()
        for arrival in arrivals:
            await self._until(arrival.at_s, clock, tasks)
            task = asyncio.create_task(self._serve(arrival, clock))
            task.add_done_callback(lambda _: self._woken.set())
            tasks.append(task)
        served = await asyncio.gather(*tasks)
        signal.setitimer(signal.ITIMER_PROF, 0)
        loop.remove_signal_handler(signal.SIGPROF)
        return Ran(list(served), clock.busy())

    async def _until(
        self, at_s: float, clock: CpuClock, tasks: Sequence[asyncio.Task[Served]]
    ) -> None:
        """Wait for that CPU second; an engine with nothing to do is there at once."""
        while clock.now() < at_s:
            if all(task.done() for task in tasks):
                clock.skip_to(at_s)
                return
            self._woken.clear()
            signal.setitimer(signal.ITIMER_PROF, max(1e-3, at_s - clock.now()))
            await self._woken.wait()

    async def _serve(self, arrival: Arrival, clock: CpuClock) -> Served:
        first_s: list[float] = []

        def on_event(_event: Event) -> None:
            if not first_s:
                first_s.append(clock.now() - arrival.at_s)

        sample = SampleRequest(
            PROMPT, seed=arrival.seed, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        )
        parts = () if self.plain else (self.endpoint.parts[arrival.subject],)
        [image] = await self.endpoint.engine.generate(Order((sample,), parts, on_event=on_event))
        return Served(arrival, first_s[0], clock.now() - arrival.at_s, image.picture)


async def _started(base: Base, store: Store, config: EngineConfig) -> Engine:
    return Engine(base, store, config)
