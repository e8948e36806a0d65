"""One worker at a time, across processes and nodes that share a folder.

A lease is a numbered file in a folder of its own; the highest number counts. Whoever creates the
next number (O_EXCL, atomic on network file systems too) holds the lease, and nobody ever removes
the highest one, so a number is never given twice. The holder touches its file every `heartbeat_s`.
A waiter takes over when the holder released it, when the holder is a dead process of this host, or
when the file did not change for `expiry_s` of the waiter's own clock, or for ten times that by the
clock of the file system (the clocks of two nodes are never compared). A holder that was stopped for
so long finds a higher number, and `held` is False.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RELEASED = b"released"
STALE = 10.0
"""Expiries after which a lease is not even watched."""


@dataclass(frozen=True)
class _Seen:
    """The highest lease file at one moment; equal when nothing happened in between."""

    number: int
    content: bytes
    touched_ns: int


class Lease:
    """The right to write under one name; `try_acquire` until it is True, then `release`."""

    def __init__(self, folder: Path, *, expiry_s: float = 120.0, heartbeat_s: float = 5.0) -> None:
        if heartbeat_s * 2 > expiry_s:
            raise ValueError(f"heartbeat_s {heartbeat_s} must be at most half of {expiry_s}")
        self.folder = folder
        self._expiry_s, self._heartbeat_s = expiry_s, heartbeat_s
        self._number = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen: tuple[_Seen, float] | None = None

    def try_acquire(self) -> bool:
        """Takes the lease if it is free now; call again later otherwise. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        seen = self._look()
        if seen is not None and not self._is_free(seen):
            return False
        number = seen.number + 1 if seen else 1
        path = self._path(number)
        try:
            with path.open("xb") as file:
                file.write(_identity())
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return False
        except OSError:
            path.unlink(missing_ok=True)
            raise
        if max(self._numbers(), default=0) != number:
            # While we decided, others took, released and cleaned this number: ours is void.
            path.unlink(missing_ok=True)
            return False
        self._number = number
        for old in self._numbers():
            if old < number:
                self._path(old).unlink(missing_ok=True)
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return True

    @property
    def held(self) -> bool:
        """Whether the lease is still ours."""
        return self._number > 0 and max(self._numbers(), default=0) == self._number

    def release(self) -> None:
        """Gives the lease back; the marker file stays, so that its number is not given again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        number, self._number = self._number, 0
        if number and max(self._numbers(), default=0) == number:
            try:
                self._path(number).write_bytes(RELEASED)
            except OSError:
                # A full disk: without its heartbeat, and with its process gone, it is taken over.
                return

    def _is_free(self, seen: _Seen) -> bool:
        if seen.content == RELEASED or _is_dead_here(seen.content):
            return True
        now = time.monotonic()
        if self._seen is None or self._seen[0] != seen:
            if self._file_system_now_ns() - seen.touched_ns > STALE * self._expiry_s * 1e9:
                return True
            self._seen = (seen, now)
        return now - self._seen[1] > self._expiry_s

    def _file_system_now_ns(self) -> int:
        probe = self.folder / f".now-{uuid.uuid4().hex}"
        try:
            probe.touch()
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)

    def _look(self) -> _Seen | None:
        while numbers := self._numbers():
            number = max(numbers)
            try:
                with self._path(number).open("rb") as file:
                    return _Seen(number, file.read(), os.fstat(file.fileno()).st_mtime_ns)
            except FileNotFoundError:
                continue
        return None

    def _numbers(self) -> list[int]:
        try:
            return [int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit()]
        except FileNotFoundError:  # somebody deleted the whole folder
            return []

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}"

    def _beat(self) -> None:
        path = self._path(self._number)
        while not self._stop.wait(self._heartbeat_s):
            try:
                os.utime(path)
            except FileNotFoundError:
                return
            except OSError:
                continue


def _identity() -> bytes:
    """Who holds the lease: host, boot and process namespace, pid and its start, one of a kind."""
    values: dict[str, Any] = {
        "host": _host(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "owner": uuid.uuid4().hex,
    }
    return json.dumps(values).encode()


def _is_dead_here(content: bytes) -> bool:
    """Whether the holder is known to be gone: a process of this very host that ended."""
    try:
        holder = json.loads(content)
        host, pid, started = holder["host"], int(holder["pid"]), holder["started"]
    except (ValueError, KeyError, TypeError):
        return False
    return bool(host == _host() and started and _started(pid) != started)


def _host() -> str:
    """Equal for two processes that see each other's pids (containers may share a host name)."""
    parts = [os.uname().nodename]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        parts.append("unknown")
    return " ".join(parts)


def _started(pid: int) -> str:
    """When the process began, in clock ticks since boot; empty when there is none (or a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
