"""Routing between real replicas that only say who they are: affinity, spill, a death."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

pytestmark = pytest.mark.ray

NUM_FREE = 4
SUBJECTS = [f"subject-{number}" for number in range(12)]


@dataclass(frozen=True)
class Asked:
    """What the router reads of a request."""

    n: int = 1
    seconds: float = 0.0


SHORT = Asked()


class Who:
    """Says its process id, as late as it is asked to."""

    async def ask(self, asked: Asked) -> int:
        await asyncio.sleep(asked.seconds)
        return os.getpid()


@pytest.fixture(scope="module")
def handle(ray_session: Any) -> Iterator[Any]:
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from raybooth_serving.app import ROUTER

    kwargs = {"num_free": NUM_FREE, "wait_s": 0.5}
    router = RequestRouterConfig(request_router_class=ROUTER, request_router_kwargs=kwargs)
    who = serve.deployment(
        Who,
        num_replicas=3,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100,
        request_router_config=router,
        health_check_period_s=60,
    )
    yield serve.run(who.bind(), name="who", route_prefix=None)
    serve.shutdown()


def ask(handle: Any, subject_id: str, asked: Asked = SHORT, times: int = 1) -> list[int]:
    """Pids that answer calls made at once."""
    calls = [handle.options(session_id=subject_id).ask.remote(asked) for _ in range(times)]
    return [call.result(timeout_s=60) for call in calls]


def test_a_subject_stays_on_its_replica_and_subjects_spread(handle: Any) -> None:
    homes = {subject_id: ask(handle, subject_id)[0] for subject_id in SUBJECTS}
    assert len(set(homes.values())) == 3
    for subject_id in SUBJECTS:
        time.sleep(0.1)  # until the router knows that the calls before have ended
        assert set(ask(handle, subject_id, times=NUM_FREE)) == {homes[subject_id]}


def test_a_hot_subject_spills_and_comes_home(handle: Any) -> None:
    (home,) = ask(handle, "subject-0")
    pids = Counter(ask(handle, "subject-0", Asked(seconds=1.0), times=18))
    assert len(pids) == 3
    assert max(pids.values()) <= 8, "1.25 times the mean of 6"
    time.sleep(0.3)
    assert ask(handle, "subject-0") == [home]


def test_many_images_of_one_request_count(handle: Any) -> None:
    (home,) = ask(handle, "subject-1")
    time.sleep(0.3)
    busy = handle.options(session_id="subject-1").ask.remote(Asked(n=8, seconds=1.5))
    time.sleep(0.3)
    assert ask(handle, "subject-1") != [home]
    assert busy.result() == home


def test_others_take_over_from_a_replica_that_died(handle: Any) -> None:
    from ray.serve.exceptions import DeploymentUnavailableError

    time.sleep(0.3)
    homes = {subject_id: ask(handle, subject_id)[0] for subject_id in SUBJECTS}
    gone = homes["subject-2"]
    stayed = [subject_id for subject_id, home in homes.items() if home != gone]
    os.kill(gone, signal.SIGKILL)
    assert ask(handle, "subject-2") != [gone]
    assert ask(handle, stayed[0]) == [homes[stayed[0]]]

    for pid in handle.broadcast("ask", SHORT).results():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(DeploymentUnavailableError):
        ask(handle, "subject-2")
