"""One holder at a time, whoever dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raybooth.data.lease import Lease, _identity

COUNT = """
import sys, time
from pathlib import Path
from raybooth.data.lease import Lease
folder, counter, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for _ in range(rounds):
    lease = Lease(folder)
    while not lease.try_acquire():
        time.sleep(0.001)
    count = int(counter.read_text())
    time.sleep(0.0005)
    counter.write_text(str(count + 1))
    assert lease.held
    lease.release()
"""
HOLD = """
import sys, time
from pathlib import Path
from raybooth.data.lease import Lease
lease = Lease(Path(sys.argv[1]))
assert lease.try_acquire()
print("held", flush=True)
time.sleep(600)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def elsewhere(folder: Path, number: int = 1) -> Path:
    """A lease held by a process of another node."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:08d}"
    holder = {**json.loads(_identity()), "host": "another-node"}
    path.write_text(json.dumps(holder))
    return path


def test_acquire_release_acquire(tmp_path: Path) -> None:
    first, second = Lease(tmp_path / "a"), Lease(tmp_path / "a")
    assert first.try_acquire()
    assert first.held
    assert not second.try_acquire()
    first.release()
    assert not first.held
    assert second.try_acquire()
    assert not first.try_acquire()
    second.release()
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_processes_exclude_each_other(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    running = [start(COUNT, tmp_path / "lease", counter, 40) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert counter.read_text() == "160"


def test_a_killed_holder_of_this_host_is_followed_at_once(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    lease = Lease(tmp_path, expiry_s=3600.0)
    assert not lease.try_acquire()
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert lease.try_acquire()  # a zombie until wait(): dead all the same
    lease.release()
    holder.wait()
    holder.stdout.close()


def test_a_holder_shows_that_it_lives(tmp_path: Path) -> None:
    lease = Lease(tmp_path, expiry_s=10.0, heartbeat_s=0.02)
    assert lease.try_acquire()
    (path,) = tmp_path.iterdir()
    os.utime(path, (1, 1))
    until = time.monotonic() + 30
    while path.stat().st_mtime < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert path.stat().st_mtime > 2
    lease.release()


def test_a_reused_pid_is_not_the_holder(tmp_path: Path) -> None:
    path = elsewhere(tmp_path)
    holder = {**json.loads(_identity()), "started": "1"}
    path.write_text(json.dumps(holder))
    lease = Lease(tmp_path, expiry_s=3600.0)
    assert lease.try_acquire()
    lease.release()


def test_a_holder_elsewhere_is_waited_for_while_it_lives(tmp_path: Path) -> None:
    path = elsewhere(tmp_path)
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.02):
            os.utime(path)

    heart = threading.Thread(target=live)
    heart.start()
    lease = Lease(tmp_path, expiry_s=0.5, heartbeat_s=0.1)
    until = time.monotonic() + 1.2
    while time.monotonic() < until:
        assert not lease.try_acquire()
        time.sleep(0.02)
    stop.set()
    heart.join()
    while not lease.try_acquire():
        time.sleep(0.02)
    assert lease.held
    lease.release()


def test_a_holder_elsewhere_that_is_long_gone_is_not_waited_for(tmp_path: Path) -> None:
    path = elsewhere(tmp_path)
    then = time.time() - 3600
    os.utime(path, (then, then))
    lease = Lease(tmp_path, expiry_s=300.0)
    assert lease.try_acquire()
    lease.release()
    young = elsewhere(tmp_path, number=5)
    os.utime(young, (time.time() - 2000, time.time() - 2000))
    assert not Lease(tmp_path, expiry_s=300.0).try_acquire()


def test_a_folder_that_vanished_means_lost(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "leases")
    assert lease.try_acquire()
    shutil.rmtree(tmp_path / "leases")
    assert not lease.held
    lease.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"nonsense"])
def test_a_half_written_lease_expires(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "00000007").write_bytes(content)
    lease = Lease(tmp_path, expiry_s=0.2, heartbeat_s=0.1)
    assert not lease.try_acquire()
    while not lease.try_acquire():
        time.sleep(0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["00000008"]
    lease.release()


def test_a_holder_that_was_deposed_knows_it(tmp_path: Path) -> None:
    lease = Lease(tmp_path)
    assert lease.try_acquire()
    later = elsewhere(tmp_path, number=2)
    assert not lease.held
    before = later.read_bytes()
    lease.release()
    assert later.read_bytes() == before


def test_one_waiter_of_many_follows_a_dead_holder(tmp_path: Path) -> None:
    path = elsewhere(tmp_path)
    path.write_text(json.dumps({**json.loads(_identity()), "started": "1"}))
    leases = [Lease(tmp_path) for _ in range(16)]
    won: list[bool] = [False] * len(leases)
    barrier = threading.Barrier(len(leases))

    def take(place: int) -> None:
        barrier.wait()
        won[place] = leases[place].try_acquire()

    threads = [threading.Thread(target=take, args=(place,)) for place in range(len(leases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(won) == 1
    leases[won.index(True)].release()


def test_a_heartbeat_slower_than_half_the_expiry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most half"):
        Lease(tmp_path, expiry_s=1.0, heartbeat_s=0.6)
