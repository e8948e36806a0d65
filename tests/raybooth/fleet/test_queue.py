"""The queue is durable, idempotent, refuses illegal changes and gives a job to one trainer."""

from __future__ import annotations

import itertools
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from raybooth.fleet.queue import (
    ACTIVE,
    MOVES,
    SCHEMA_VERSION,
    JobRecord,
    JobState,
    Queue,
    QueueError,
    owner_is_dead,
    this_owner,
)


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def submit(queue: Queue, job_id: str = "rex-1") -> JobRecord:
    return queue.submit(
        job_id, fleet="fleet.yaml", subject_id="rex", num_train_steps=10, spec={"rank": 4}
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(tmp_path: Path, clock: Clock) -> Queue:
    return Queue(tmp_path / "fleet.db", clock=clock, is_dead=lambda owner: owner == "dead")


ROUTES: dict[JobState, tuple[JobState, ...]] = {
    "queued": (),
    "waiting_prior": ("waiting_prior",),
    "running": ("running",),
    "publishing": ("running", "publishing"),
    "published": ("running", "publishing", "published"),
    "failed": ("failed",),
    "cancelled": ("cancelled",),
}


def bring(queue: Queue, state: JobState) -> None:
    for step in ROUTES[state]:
        queue.move("rex-1", step, error="a reason" if step == "failed" else None)


def test_a_submitted_job_waits_with_its_spec(queue: Queue) -> None:
    job = submit(queue)
    assert (job.state, job.train_step, job.attempt, job.spec) == ("queued", 0, 0, {"rank": 4})
    assert queue.get("rex-1") == job


def test_the_same_job_twice_is_one_job_that_keeps_its_state(queue: Queue) -> None:
    submit(queue)
    queue.move("rex-1", "running")
    queue.progress({"rex-1": (7, 0.25)})
    again = submit(queue)
    assert (again.state, again.train_step, again.loss) == ("running", 7, 0.25)
    assert len(queue.jobs()) == 1


def test_jobs_are_listed_in_order_of_submission(queue: Queue, clock: Clock) -> None:
    for job_id in ("c-1", "a-1", "b-1"):
        clock.now += 1
        submit(queue, job_id)
    assert [job.job_id for job in queue.jobs()] == ["c-1", "a-1", "b-1"]
    queue.move("a-1", "running")
    assert [job.job_id for job in queue.jobs(state="running")] == ["a-1"]
    assert queue.jobs(fleet="other.yaml") == []


@pytest.mark.parametrize(("before", "after"), list(itertools.product(MOVES, MOVES)))
def test_only_legal_changes_of_state(queue: Queue, before: JobState, after: JobState) -> None:
    submit(queue)
    bring(queue, before)
    error = "a reason" if after == "failed" else None
    if after in MOVES[before] or after == before:
        assert queue.move("rex-1", after, error=error).state == after
    else:
        with pytest.raises(QueueError, match=f"cannot go to {after}"):
            queue.move("rex-1", after, error=error)
        assert queue.get("rex-1").state == before


def test_every_state_can_be_reached_and_left() -> None:
    reached = set().union(*MOVES.values())
    assert reached == set(MOVES)
    assert all(MOVES.values())


def test_a_failed_job_has_a_reason_and_a_new_attempt_clears_it(queue: Queue, clock: Clock) -> None:
    submit(queue)
    with pytest.raises(QueueError, match="without a reason"):
        queue.move("rex-1", "failed")
    queue.move("rex-1", "running")
    clock.now = 1050.0
    failed = queue.move("rex-1", "failed", error="loss is nan")
    assert (failed.error, failed.finished_at, failed.attempt) == ("loss is nan", 1050.0, 1)
    queue.move("rex-1", "queued")
    running = queue.move("rex-1", "running")
    assert (running.error, running.finished_at, running.attempt) == (None, None, 2)


def test_running_again_after_a_worker_died_is_the_same_attempt(queue: Queue) -> None:
    submit(queue)
    queue.move("rex-1", "running")
    assert queue.move("rex-1", "running").attempt == 1


def test_an_unknown_job_is_an_error(queue: Queue) -> None:
    with pytest.raises(QueueError, match="no job rex-9"):
        queue.get("rex-9")


def test_a_lease_has_one_owner_until_it_expires(queue: Queue, clock: Clock) -> None:
    submit(queue)
    assert queue.claim(["rex-1"], "a", 60) == ("rex-1",)
    assert queue.claim(["rex-1"], "b", 60) == ()
    assert queue.claim(["rex-1"], "a", 60) == ("rex-1",)
    clock.now += 59
    assert queue.claim(["rex-1"], "b", 60) == ()
    clock.now += 2
    assert queue.claim(["rex-1"], "b", 60) == ("rex-1",)
    assert queue.renew("a") == ()


def test_a_heartbeat_keeps_a_lease(queue: Queue, clock: Clock) -> None:
    submit(queue)
    queue.claim(["rex-1"], "a", 60)
    for _ in range(5):
        clock.now += 50
        assert queue.renew("a", 60) == ("rex-1",)
    assert queue.claim(["rex-1"], "b", 60) == ()


def test_a_released_lease_and_that_of_a_dead_process_are_free(queue: Queue) -> None:
    for job_id in ("rex-1", "tom-1"):
        submit(queue, job_id)
    queue.claim(["rex-1"], "dead", 3600)
    queue.claim(["tom-1"], "alive", 3600)
    assert queue.claim(["rex-1", "tom-1"], "b", 60) == ("rex-1",)
    queue.release("alive", ["tom-1"])
    assert queue.claim(["tom-1"], "b", 60) == ("tom-1",)
    queue.release("b")
    assert {job.lease_owner for job in queue.jobs()} == {None}


def test_only_the_owner_moves_a_job(queue: Queue) -> None:
    submit(queue)
    queue.claim(["rex-1"], "a")
    with pytest.raises(QueueError, match="not ours to move"):
        queue.move("rex-1", "running", owner="b")
    assert queue.move("rex-1", "running", owner="a").state == "running"


def test_of_many_claimants_at_once_exactly_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    jobs = [f"job-{i}" for i in range(20)]
    first = Queue(path, is_dead=lambda owner: False)
    for job_id in jobs:
        submit(first, job_id)
    won: dict[str, tuple[str, ...]] = {}

    def claim(owner: str) -> None:
        own = Queue(path, is_dead=lambda owner: False)
        won[owner] = tuple(j for job_id in jobs for j in own.claim([job_id], owner))

    threads = [threading.Thread(target=claim, args=(f"owner-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(itertools.chain(*won.values())) == sorted(jobs)


def test_this_process_is_alive_and_a_finished_one_is_dead() -> None:
    assert not owner_is_dead(this_owner())
    assert not owner_is_dead("another-host/1/1")
    code = "from raybooth.fleet.queue import this_owner; print(this_owner())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert owner_is_dead(ended.stdout.strip())


def test_a_reused_pid_is_another_owner() -> None:
    host, pid, start = this_owner().split("/")
    assert owner_is_dead(f"{host}/{pid}/{int(start) - 1}")


def test_what_was_committed_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    code = f"""
        import os, signal
        from pathlib import Path
        from raybooth.fleet.queue import Queue, this_owner
        queue = Queue(Path({str(path)!r}))
        queue.submit("rex-1", fleet="f", subject_id="rex", num_train_steps=9, spec=[1])
        queue.claim(["rex-1"], this_owner(), 3600)
        queue.move("rex-1", "running", owner=this_owner())
        queue.progress({{"rex-1": (5, 0.5)}})
        with queue._transaction() as rows:
            rows.execute("UPDATE jobs SET train_step = 6")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert ended.returncode == -signal.SIGKILL
    queue = Queue(path)
    job = queue.get("rex-1")
    assert (job.state, job.train_step, job.loss, job.spec) == ("running", 5, 0.5, [1])
    assert queue.claim(["rex-1"], this_owner()) == ("rex-1",)


def test_a_queue_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    Queue(path)
    with sqlite3.connect(path) as rows:
        rows.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(QueueError, match="another version"):
        Queue(path)


def test_a_database_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    with sqlite3.connect(path) as rows:
        rows.execute("CREATE TABLE something (id INTEGER)")
    with pytest.raises(QueueError, match="another version"):
        Queue(path)
    path = tmp_path / "text.db"
    path.write_bytes(b"not a database at all, just some text" * 40)
    with pytest.raises(QueueError, match="cannot be used"):
        Queue(path)


def test_a_folder_that_is_missing_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(QueueError, match="cannot be used"):
        Queue(tmp_path / "nowhere" / "fleet.db")


def test_active_states_are_those_that_can_still_train() -> None:
    assert {"queued", "waiting_prior", "running", "publishing"} == ACTIVE


def test_the_queue_needs_neither_torch_nor_ray() -> None:
    code = "import sys, raybooth.fleet.queue; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
