"""A cluster that cannot be reached is told at once; a dead worker's reason is found."""

from __future__ import annotations

import socket

import pytest
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from raybooth.errors import BaseModelError, ClusterError
from raybooth.fleet.launch import cluster, reason_of
from raybooth.fleet.machine import gpu_memory_bytes, this_machine


def test_an_address_where_nobody_listens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ClusterError, match="cannot be reached"), cluster():
            pass


def test_an_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    with pytest.raises(ClusterError, match="not an address"), cluster():
        pass


def test_the_reason_is_the_worker_s_own_words() -> None:
    inner = BaseModelError("the base is not the one planned", "fingerprint 12")
    failed = WorkerGroupError("long text\nwith a traceback", {0: inner})
    assert reason_of(failed) == "the base is not the one planned: found fingerprint 12"
    assert reason_of(ControllerError(failed)) == reason_of(failed)
    assert reason_of(MemoryError()) == "MemoryError: no message"
    assert reason_of(ValueError("first\n\n  last line  \n")) == "ValueError: last line"


def test_this_machine_has_a_cpu_and_memory() -> None:
    (node,) = this_machine().nodes
    assert node.num_cpus >= 1
    assert node.memory_bytes is not None
    assert node.memory_bytes > 2**28


def test_a_gpu_s_memory_is_told_by_its_name() -> None:
    assert gpu_memory_bytes({"CPU": 8.0, "accelerator_type:H200": 1.0}) == 141 * 10**9
    assert gpu_memory_bytes({"CPU": 8.0, "accelerator_type:Unheard-of": 1.0}) is None
    assert gpu_memory_bytes({"CPU": 8.0}) is None
