"""The thin shell around Ray: start or find a cluster, read its capacity, run a pack, clean up."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray

from raybooth.errors import ClusterError, RayBoothError, TrainingError
from raybooth.fleet.events import Monitor
from raybooth.fleet.machine import WORKER_SETTINGS, gpu_memory_bytes, this_machine
from raybooth.fleet.planner import Capacity, NodeCapacity
from raybooth.fleet.task import PackOutcome, PackTask

CONNECT_S = 60.0
OBJECT_STORE_BYTES = 150 << 20
"""Packs and monitor exchange events only; 75 MiB is the least that Ray takes."""


@contextmanager
def cluster() -> Iterator[bool]:
    """Ray for as long as the context lasts; yields whether an autoscaler may add nodes to it.

    An already running session is used as it is; else RAY_ADDRESS is joined; else a local Ray is
    started, and ended again. Raises ClusterError when the address does not answer.
    """
    if ray.is_initialized():
        yield False
        return
    address = os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if address:
            _join(address, {**quiet, "runtime_env": {"env_vars": worker_environment()}})
        else:
            os.environ.update(worker_environment())  # its processes are our children
            _start(quiet)
        yield bool(address)
    finally:
        ray.shutdown()


def total_capacity() -> Capacity:
    """What the living nodes have in all."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Capacity(tuple(_node(resources) for resources in nodes))


def free_capacity() -> Capacity:
    """What the living nodes have left at this moment."""
    from ray._private.state import available_resources_per_node

    return Capacity(tuple(_node(left) for left in available_resources_per_node().values()))


def new_monitor() -> Any:
    """The mailbox of a fleet, as an actor that takes no CPU."""
    return ray.remote(num_cpus=0)(Monitor).remote()


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def run_pack(task: PackTask, monitor: Any) -> PackOutcome:
    """One Ray Train run: `task` trained by its workers, restarted `max_failures` times at most.

    Raises TrainingError with the last reason when it fails for good. The main thread of this
    task is inside `fit()`, so `ray.cancel` ends the run cleanly.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from raybooth.fleet.full_worker import train_full_fn
    from raybooth.fleet.trainer import PackTrainer
    from raybooth.fleet.worker import train_pack_fn

    resources = {"CPU": task.resources.num_cpus}
    if task.resources.num_gpus:
        resources["GPU"] = task.resources.num_gpus
    trainer = PackTrainer(
        train_full_fn if task.is_full else train_pack_fn,
        train_loop_config={"task": task, "monitor": monitor},
        scaling_config=ScalingConfig(
            num_workers=task.num_workers,
            use_gpu=bool(task.resources.num_gpus),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=task.run_name,
            storage_path=str(task.folders.runs),
            failure_config=FailureConfig(max_failures=task.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        done: dict[str, list[str]] = trainer.fit().return_value
    except TrainingFailedError as error:
        raise TrainingError(f"{task.pack_id} failed for good", reason_of(error)) from None
    return PackOutcome(tuple(done["published"]), tuple(done["failed"]), tuple(done["stopped"]))


def reason_of(error: BaseException) -> str:
    """The last words of what a worker died of, without its traceback."""
    failures = list(getattr(error, "worker_failures", {}).values())
    inner = (
        *failures,
        getattr(error, "controller_failure", None),
        getattr(error, "_base_exc", None),  # what Ray Train wraps a worker's own exception in
        getattr(error, "cause", None),
    )
    for cause in inner:
        if isinstance(cause, BaseException) and cause is not error:
            return reason_of(cause)
    if isinstance(error, RayBoothError):
        return str(error)
    if "worker process has died" in str(error):
        return "its worker process died: killed, out of memory, or crashed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = type(error).__name__
    return f"{name}: {lines[-1] if lines else 'no message'}"[:300]


def free_orphans() -> None:
    """Gives back what runs whose controller died still reserve.

    Ray leaves such placement groups for ever; see DESIGN section 5.
    """
    from ray._private.state import state
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    table = gcs_pb2.PlacementGroupTableData
    for raw in state._connect_and_get_accessor().get_placement_group_table():
        group = table.FromString(raw)
        orphan = group.creator_actor_dead and not group.is_detached
        if orphan and group.state != table.REMOVED:
            group_id = ray.PlacementGroupID(group.placement_group_id)
            remove_placement_group(PlacementGroup(group_id))


def worker_environment() -> dict[str, str]:
    """Environment of every process of a fleet: our sources, quick and quiet Ray Train."""
    source = str(Path(__file__).resolve().parents[2])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    known = [str(Path(path).resolve()) for path in paths]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([source, *known])),
        **{name: os.environ[name] for name in WORKER_SETTINGS if name in os.environ},
    }


def _start(options: Mapping[str, Any]) -> None:
    machine = this_machine().nodes[0]
    for last in (False, False, True):  # Ray gives its own parts 15 s: too few on a busy machine
        try:
            ray.init(
                address="local",
                num_cpus=int(machine.num_cpus),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **options,
            )
            return
        except Exception as error:  # Ray raises bare ones here
            ray.shutdown()
            if last:
                do = "free the machine, or set RAY_ADDRESS to a running cluster"
                raise ClusterError("the local Ray did not start", _last_line(error), do) from error


def _join(address: str, options: Mapping[str, Any]) -> None:
    do = "start it, correct RAY_ADDRESS, or unset it to use this machine alone"
    _probe(address, do)

    def too_late(number: int, frame: FrameType | None) -> None:
        raise ClusterError(f"Ray at {address} does not answer", f"nothing in {CONNECT_S:g} s", do)

    earlier = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, CONNECT_S)
    try:
        ray.init(address=address, **options)
    except ClusterError:
        raise
    except Exception as error:  # Ray raises bare ones here
        raise ClusterError(f"Ray at {address} cannot be used", _last_line(error), do) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def _probe(address: str, do: str) -> None:
    """Fails at once where nobody listens: Ray itself would try for a long time."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        if address == "auto":
            return
        raise ClusterError("RAY_ADDRESS is not an address", address, "write it as host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        found = error.strerror or str(error)
        raise ClusterError(f"Ray at {address} cannot be reached", found, do) from error


def _node(resources: Mapping[str, float]) -> NodeCapacity:
    memory = resources.get("memory")
    return NodeCapacity(
        num_cpus=float(resources.get("CPU", 0.0)),
        num_gpus=float(resources.get("GPU", 0.0)),
        memory_bytes=int(memory) if memory else None,
        gpu_memory_bytes=gpu_memory_bytes(resources),
    )


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
