"""Twice what the endpoint can do, for minutes, over real HTTP: does it stay up, bounded and fair?

`python -m tests.bench load --minutes 3` starts `raybooth serve` on the loopback, measures its
capacity, offers twice that by three tenants, and says of every bound whether it held (exit code 1
if one did not).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tests.bench.__main__ import print_table, write_tables
from tests.bench.arrivals import quantile
from tests.bench.load_client import Call, Callers, Outcome, draw_call, plan_calls
from tests.bench.load_server import Server, serving
from tests.bench.rounds import TableReport

SHARES = {"greedy": 4, "modest": 1, "small": 1}
"""How the offered load is split. An even split of what is served is a third each."""

SUBJECTS = tuple(f"robot-{index}" for index in range(8))
MODELS = ("pocket", *SUBJECTS)
QUEUE = 16
ENGINE = {"num_slots": 4, "max_rank": 8, "max_queued_images": QUEUE}
"""Fewer slots than subjects, so that slots change hands all the time."""

OVERLOAD = 2.0
WORKERS = 16
SAMPLE_S = 2.0
WINDOW_S = 30.0
RETRIERS = 8
GROWTH = 0.15
"""Memory may grow by this over the last three quarters."""

SLACK = 3.0
"""p99 of what was accepted, in times to work off a full queue and batch."""

COMMAND = "python -m tests.bench load"


@dataclass(frozen=True, slots=True)
class Sample:
    """The endpoint at one moment; `waiting` is None when it did not answer."""

    at_s: float
    waiting: float | None
    running: float
    engine_bytes: int
    gateway_bytes: int


@dataclass(frozen=True, slots=True)
class Bound:
    """What must hold, in words."""

    words: str
    found: str
    held: bool


@dataclass(frozen=True, slots=True)
class Run:
    """All that was seen."""

    seconds: float
    capacity_per_s: float
    outcomes: list[Outcome]
    samples: list[Sample]
    retried: list[tuple[int, float]]
    """Status of the one retry, and the seconds that Retry-After had said."""

    replicas: list[set[int]]
    counters: dict[str, float]
    idle_after_s: float | None


def main(argv: Sequence[str]) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the endpoint would live on
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), SUBJECTS, tuple(SHARES), ENGINE) as server,
    ):
        run = asyncio.run(_play(server, 60 * options.minutes))
    bounds = _bounds(run)
    tables = [_tenants(run, options.minutes), _windows(run), _verdict(bounds)]
    console = Console()
    for table in tables:
        print_table(table, console)
    if not options.no_file:
        console.print(f"written to {write_tables(tables)}")
    return 0 if all(bound.held for bound in bounds) else 1


async def _play(server: Server, seconds: float) -> Run:
    callers = Callers(server.url, server.keys)
    draw = random.Random(0)
    capacity = await _capacity(callers, server, draw, min(20.0, seconds / 3))
    total = sum(SHARES.values())
    rates = {name: OVERLOAD * capacity * share / total for name, share in SHARES.items()}
    calls = plan_calls(rates, seconds, MODELS, seed=1)
    print(f"capacity {capacity:.2f} requests/s; {len(calls)} requests in {seconds:g} s", flush=True)
    before = server.replicas()
    samples: list[Sample] = []
    sampling = asyncio.create_task(_sample(callers, server, samples))
    outcomes = await callers.play(calls)
    idle_after_s = await _idle(callers, 120.0)
    sampling.cancel()
    retried = await _retry(callers, draw)
    counters = (await callers.get("/metrics.json", "small")).json()
    replicas = [before, server.replicas()]
    await callers.client.aclose()
    return Run(seconds, capacity, outcomes, samples, retried, replicas, counters, idle_after_s)


async def _capacity(callers: Callers, server: Server, draw: random.Random, seconds: float) -> float:
    """Requests for each CPU second of the engine, while WORKERS callers keep it busy.

    What it does in a second of a wall clock is less where it shares its core; twice this is
    never less than twice its capacity.
    """
    num_done = 0
    start = time.monotonic()

    async def work(tenant: str) -> None:
        nonlocal num_done
        while time.monotonic() < start + seconds:
            call = draw_call(draw, 0.0, tenant, MODELS, plain=True)
            outcome = await callers.send(call)
            num_done += outcome.status == 200
            if outcome.status != 200:
                await asyncio.sleep(1.0)

    before_s = server.engine_s()
    tenants = list(SHARES)
    await asyncio.gather(*(work(tenants[index % 3]) for index in range(WORKERS)))
    return num_done / (server.engine_s() - before_s)


async def _sample(callers: Callers, server: Server, samples: list[Sample]) -> None:
    while True:
        memory = server.memory()
        counters: dict[str, float] = {}
        answer = await callers.get("/metrics.json", "small")
        if answer.status_code == 200:
            counters = answer.json()
        at_s = time.monotonic() - callers.origin
        waiting, running = counters.get("images_waiting"), counters.get("images_running", 0.0)
        samples.append(Sample(at_s, waiting, running, memory["engine"], memory["gateway"]))
        await asyncio.sleep(SAMPLE_S)


async def _idle(callers: Callers, timeout_s: float) -> float | None:
    """Seconds until nothing waits or runs; None: never."""
    start = time.monotonic()
    while time.monotonic() < start + timeout_s:
        counters = (await callers.get("/metrics.json", "small")).json()
        if counters["images_waiting"] + counters["images_running"] == 0:
            return time.monotonic() - start
        await asyncio.sleep(1.0)
    return None


async def _retry(callers: Callers, draw: random.Random) -> list[tuple[int, float]]:
    """A burst that overfills the queue; RETRIERS of those refused wait and try once more."""
    tenants = list(SHARES)
    num = 2 * QUEUE + WORKERS
    calls = [draw_call(draw, 0.0, tenants[i % 3], MODELS, plain=True) for i in range(num)]
    retriers: list[asyncio.Task[tuple[int, float]]] = []

    async def again(call: Call, after_s: float) -> tuple[int, float]:
        await asyncio.sleep(after_s)
        return (await callers.send(call)).status, after_s

    async def first(call: Call) -> None:
        said = (await callers.send(call)).retry_after_s
        if said and said[0] is not None and len(retriers) < RETRIERS:
            retriers.append(asyncio.create_task(again(call, said[0])))

    await asyncio.gather(*(first(call) for call in calls))
    return list(await asyncio.gather(*retriers))


def _bounds(run: Run) -> list[Bound]:
    answered = [each for each in run.outcomes if not each.call.is_bad and each.status != -1]
    accepted = [each for each in answered if each.status == 200]
    hurried = [each for each in answered if each.call.deadline_s is not None]
    in_time = [each for each in hurried if each.status == 200]
    refusals = {each.call.deadline_s: (429, 408, 504) for each in hurried} | {None: (429,)}
    odd = [each for each in answered if each.status not in (200, *refusals[each.call.deadline_s])]
    bad = [each for each in run.outcomes if each.call.is_bad]
    refused = [after for each in run.outcomes for after in each.retry_after_s]
    waiting = [each.waiting for each in run.samples if each.waiting is not None]
    p99 = quantile([each.seconds for each in accepted], 0.99) if accepted else float("inf")
    per_s = len(accepted) / (run.seconds + (run.idle_after_s or 0.0))
    limit = SLACK * (QUEUE + max(each.running for each in run.samples)) / per_s
    early, late = _memory(run)
    shares = {name: _share(run, name) for name in SHARES}
    medians = {name: _median(run, name) for name in SHARES}
    few = ("modest", "small")
    words = "; ".join(sorted({f"{each.status} {each.words[:160]}" for each in odd})[:3])
    same = run.replicas[0] == run.replicas[1] != set()
    in_again = sum(status == 200 for status, _ in run.retried)
    told = sorted({seconds for _, seconds in run.retried})
    return [
        Bound("no crash: the same engine replica from begin to end", str(run.replicas), same),
        Bound(
            "every answer is an image or a 429 (with a deadline: 408 and 504 too)",
            f"{len(odd)} others {words}",
            not odd,
        ),
        Bound(
            "bad requests are refused as the caller's fault",
            str(dict(Counter(each.status for each in bad))),
            all(each.status in (400, 404, 429) for each in bad),
        ),
        Bound(
            f"at most {QUEUE} images wait",
            f"{max(waiting):.0f} at most, {len(run.samples) - len(waiting)} samples unanswered",
            max(waiting) <= QUEUE and len(waiting) == len(run.samples),
        ),
        Bound(f"p99 of what was accepted is below {limit:.0f} s", f"{p99:.1f} s", p99 <= limit),
        Bound(
            "every 429 says when to come back, 1 to 120 s",
            f"{len(refused)} of them, {min(refused, default=0)} to {max(refused, default=0)} s",
            bool(refused) and all(after is not None and 1 <= after <= 120 for after in refused),
        ),
        Bound(
            "after a burst, who waits as told gets in at the first retry",
            f"{in_again} of {len(run.retried)}, told to wait {told} s",
            in_again == len(run.retried) > 0,
        ),
        Bound(
            "who names a deadline has the image by then (1 s for the way), or a refusal",
            f"{len(in_time)} of {len(hurried)} images in time",
            all(each.seconds <= (each.call.deadline_s or 0.0) + 1.0 for each in in_time),
        ),
        Bound(
            "who asks for little is let in as often as who asks for much (three quarters of it)",
            ", ".join(f"{name} {share:.0%}" for name, share in shares.items()),
            sum(shares[name] for name in few) / len(few) >= 0.75 * shares["greedy"],
        ),
        Bound(
            "and does not wait longer (median)",
            ", ".join(f"{name} {median:.1f} s" for name, median in medians.items()),
            sum(medians[name] for name in few) / len(few) <= 1.1 * medians["greedy"],
        ),
        Bound(
            "the engine goes idle when nobody asks any more",
            "never" if run.idle_after_s is None else f"after {run.idle_after_s:.0f} s",
            run.idle_after_s is not None,
        ),
        Bound(
            f"memory grows by at most {GROWTH:.0%} over the last three quarters",
            f"{early / 2**20:.0f} to {late / 2**20:.0f} MiB",
            late <= (1 + GROWTH) * early,
        ),
    ]


def _memory(run: Run) -> tuple[float, float]:
    """Bytes of engine and gateway at a quarter of the time and at the end."""
    early = [each for each in run.samples if each.at_s >= run.seconds / 4]
    sizes = [each.engine_bytes + each.gateway_bytes for each in early]
    return float(sizes[0]), float(max(sizes[-3:]))


def _share(run: Run, tenant: str) -> float:
    """Accepted, of a tenant's good requests that waited for an answer."""
    statuses = [each.status for each in _good(run, tenant)]
    return statuses.count(200) / max(1, len(statuses))


def _median(run: Run, tenant: str) -> float:
    """Seconds of a tenant's accepted requests."""
    times = [each.seconds for each in _good(run, tenant) if each.status == 200]
    return quantile(times, 0.5) if times else float("inf")


def _good(run: Run, tenant: str) -> list[Outcome]:
    return [
        each
        for each in run.outcomes
        if each.call.tenant == tenant and not each.call.is_bad and each.status != -1
    ]


def _tenants(run: Run, minutes: float) -> TableReport:
    heads = ("tenant", "requests/s", "accepted", "429", "p50, s", "p95, s", "p99, s", "images/s")
    rows = []
    for tenant in SHARES:
        good = _good(run, tenant)
        accepted = [each for each in good if each.status == 200]
        images = sum(each.call.body["n"] for each in accepted)
        times = [each.seconds for each in accepted] or [float("nan")]
        rows.append(
            (
                tenant,
                f"{len(good) / run.seconds:.2f}",
                f"{len(accepted)} of {len(good)}",
                f"{sum(each.status == 429 for each in good) / max(1, len(good)):.0%}",
                *(f"{quantile(times, share):.1f}" for share in (0.5, 0.95, 0.99)),
                f"{images / run.seconds:.2f}",
            )
        )
    left = sum(each.status == -1 for each in run.outcomes)
    tried = [each for each in run.outcomes if each.retry_after_s and each.call.is_patient]
    got_in = sum(each.status == 200 for each in tried)
    notes = [
        f"Capacity measured just before, {WORKERS} callers at a time: {run.capacity_per_s:.2f} "
        f"requests for a CPU second of the engine; offered {OVERLOAD:g} times that a second: mixed "
        f"sizes, steps, guidance, 1 or 2 images, a fifth streamed; {left} callers left early, "
        f"{run.counters['images_cancelled']:.0f} images taken out of queue or batch.",
        f"Of {len(tried)} refused that waited as Retry-After says, the overload going on, "
        f"{got_in} got in at the one retry.",
    ]
    title = f"Load: {OVERLOAD:g} times its capacity for {minutes:g} minutes, by tenant"
    return TableReport(title, f"{COMMAND} --minutes {minutes:g}", heads, rows, notes)


def _windows(run: Run) -> TableReport:
    heads = ("from, s", "waiting, most", "running, mean", "accepted/s", "429/s", "p99, s", "MiB")
    rows = []
    for start in range(0, int(run.seconds), int(WINDOW_S)):
        samples = [each for each in run.samples if start <= each.at_s < start + WINDOW_S]
        sent = [each for each in run.outcomes if start <= each.sent_s < start + WINDOW_S]
        accepted = [each.seconds for each in sent if each.status == 200]
        if not samples or not accepted:
            rows.append((str(start), *("-" for _ in heads[1:])))
            continue
        refused = sum(each.status == 429 for each in sent)
        mib = max(each.engine_bytes + each.gateway_bytes for each in samples) / 2**20
        rows.append(
            (
                str(start),
                f"{max(each.waiting or 0 for each in samples):.0f}",
                f"{sum(each.running for each in samples) / len(samples):.1f}",
                f"{len(accepted) / WINDOW_S:.2f}",
                f"{refused / WINDOW_S:.2f}",
                f"{quantile(accepted, 0.99):.1f}",
                f"{mib:.0f}",
            )
        )
    return TableReport("Load: over time", COMMAND, heads, rows, ["MiB: engine and gateway."])


def _verdict(bounds: Sequence[Bound]) -> TableReport:
    rows = [(each.words, each.found, "held" if each.held else "BROKEN") for each in bounds]
    return TableReport("Load: bounds", COMMAND, ("bound", "found", ""), rows)
