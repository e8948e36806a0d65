"""Callers of the load test: each sends one request, perhaps leaves early, perhaps tries again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

SIZES = ("64x64", "64x64", "64x64", "64x96")
STEPS = (4, 6, 8, 12)
GUIDANCE = (1.0, 3.0, 3.0)
PATH = "/v1/images/generations"
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it is planned."""

    at_s: float
    tenant: str
    body: dict[str, Any]
    leaves_after_s: float | None = None
    deadline_s: float | None = None
    """What it says in the header; the image by then or a refusal."""

    is_bad: bool = False
    """Must be refused as the caller's own fault."""

    is_patient: bool = False
    """Waits as Retry-After says and tries once more."""


@dataclass(slots=True)
class Outcome:
    """What became of a call."""

    call: Call
    status: int
    """Of its last try; 0: no answer, -1: the caller left."""

    seconds: float
    """From sending it (the last try) to the last byte."""

    sent_s: float
    retry_after_s: list[float | None] = field(default_factory=list)
    """What each 429 said."""

    words: str = ""


def plan_calls(
    rates: dict[str, float], seconds: float, models: Sequence[str], seed: int
) -> list[Call]:
    """Poisson arrivals of every tenant at its rate: mixed sizes, steps, streams and leavers."""
    draw = random.Random(seed)
    calls = []
    for tenant, rate in rates.items():
        at_s = draw.expovariate(rate)
        while at_s < seconds:
            calls.append(draw_call(draw, at_s, tenant, models))
            at_s += draw.expovariate(rate)
    return sorted(calls, key=lambda call: call.at_s)


def draw_call(
    draw: random.Random, at_s: float, tenant: str, models: Sequence[str], *, plain: bool = False
) -> Call:
    """One call; `plain`: none that leaves, streams or is bad."""
    body: dict[str, Any] = {
        "model": draw.choice(models),
        "prompt": draw.choice(("a photo of sks robot", "a photo of sks robot on the beach")),
        "n": draw.choice((1, 1, 1, 2)),
        "size": draw.choice(SIZES),
        "num_inference_steps": draw.choice(STEPS),
        "guidance_scale": draw.choice(GUIDANCE),
        "seed": draw.randrange(2**31),
    }
    chance = 1.0 if plain else draw.random()
    if chance < 0.03:
        bad = draw.choice(
            ({"model": "nobody"}, {"n": 0}, {"size": "65x64"}, {"guidance_scale": 1e9})
        )
        return Call(at_s, tenant, {**body, **bad}, is_bad=True)
    if chance < 0.13:
        return Call(at_s, tenant, body, leaves_after_s=draw.uniform(0.2, 4.0))
    if chance < 0.33:
        body |= {"stream": True, "partial_images": draw.choice((0, 1, 2))}
    elif chance < 0.43:
        return Call(at_s, tenant, body, deadline_s=draw.choice((5.0, 20.0)))
    return Call(at_s, tenant, body, is_patient=draw.random() < 0.15)


class Callers:
    """Sends calls to one endpoint and keeps what became of them."""

    def __init__(self, url: str, keys: dict[str, str]) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self.client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits)
        self.keys = keys
        self.origin = time.monotonic()

    async def play(self, calls: Sequence[Call]) -> list[Outcome]:
        """All of them, each at its time whatever became of the others."""
        self.origin = time.monotonic()
        return list(await asyncio.gather(*(self._at(call) for call in calls)))

    async def send(self, call: Call) -> Outcome:
        """Now; a patient one once more after Retry-After."""
        outcome = await self._try(call)
        if outcome.status == 429 and call.is_patient and outcome.retry_after_s[0] is not None:
            await asyncio.sleep(outcome.retry_after_s[0])
            again = await self._try(call)
            again.retry_after_s = outcome.retry_after_s + again.retry_after_s
            return again
        return outcome

    async def get(self, path: str, tenant: str) -> httpx.Response:
        """One GET."""
        return await self.client.get(path, headers=self._headers(tenant))

    async def _at(self, call: Call) -> Outcome:
        await asyncio.sleep(max(0.0, self.origin + call.at_s - time.monotonic()))
        return await self.send(call)

    async def _try(self, call: Call) -> Outcome:
        started = time.monotonic()
        status, words, after = 0, "", None
        try:
            async with asyncio.timeout(call.leaves_after_s or TIMEOUT_S):
                answer = await self.client.post(
                    PATH, json=call.body, headers=self._headers(call.tenant, call.deadline_s)
                )
            status = answer.status_code
            if status != 200:
                words = answer.text[:300]
            elif call.body.get("stream") and '"error"' in answer.text:
                status, words = 599, answer.text[-300:]
            if status == 429:
                after = float(answer.headers["retry-after"])
        except TimeoutError:
            status = -1 if call.leaves_after_s is not None else 0
        except (httpx.HTTPError, KeyError) as error:
            words = f"{type(error).__name__}: {error}"
        done = time.monotonic()
        outcome = Outcome(call, status, done - started, started - self.origin, words=words)
        if status == 429:
            outcome.retry_after_s.append(after)
        return outcome

    def _headers(self, tenant: str, deadline_s: float | None = None) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        if deadline_s is not None:
            headers["x-request-timeout-seconds"] = f"{deadline_s:g}"
        return headers
