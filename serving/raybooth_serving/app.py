"""The endpoint on Ray Serve: an HTTP gateway before engine replicas, deployed by config.

`raybooth_serving.app:build` is the import path for Serve config files; its args are `config` (a
name or path of configs/serve) or ServeConfig's own keys, and `home` (default RAYBOOTH_HOME).
Each base has a deployment of its own. Requests of one subject go to one replica (router.py), which
then holds its adapter; others take over when it is hot or gone.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingPolicy,
    BackpressureConfig,
    RequestRouterConfig,
)
from ray.serve.schema import ApplicationStatus, LoggingConfig, ServeDeploySchema

from raybooth.config import (
    EngineConfig,
    LimitsConfig,
    ReplicasConfig,
    ServeConfig,
    ServedBase,
    ServedFull,
    find_config,
    load_yaml,
    merge,
    parse_config,
)
from raybooth.errors import ClusterError, ServingError
from raybooth.home import home
from raybooth_serving.scale.gateway import Gateway
from raybooth_serving.scale.replicas import EngineReplica, FullReplica

APPLICATION = "raybooth"
IMPORT_PATH = "raybooth_serving.app:build"
ROUTER = "raybooth_serving.scale.router.BoundedLoadRouter"
POLICY = "raybooth_serving.scale.scaling.BacklogPolicy"
LOOK_BACK_S = 15.0
"""Replicas tell their backlog every 10 s at most; this is what it is averaged over."""

START_TIMEOUT_S = 600.0
START_ATTEMPTS = 3
"""A Ray of our own dies at birth where its agent takes over 15 s to start (2.60, busy machine)."""

logger = logging.getLogger(__name__)


def build(args: Mapping[str, Any]) -> serve.Application:
    """The Serve application of a serve config (see this file's top)."""
    values = dict(args)
    root = Path(values.pop("home", None) or home()).absolute()
    named = values.pop("config", None)
    if named is not None:
        values = merge(load_yaml(find_config("serve", named)) or {}, values)
    config = parse_config(ServeConfig, values, "serve args")
    plain = config.model_dump(mode="json")
    engines = [
        _engines(EngineReplica, f"engine-{served.slug}", served, served.engine, config.limits).bind(
            plain, place, str(root)
        )
        for place, served in enumerate(config.bases)
    ]
    full = None
    if config.full is not None:
        largest = max((served.engine for served in config.bases), key=_most_images)
        full = _engines(FullReplica, "engine-full", config.full, largest, config.limits)
        full = full.bind(plain, str(root))
    return serve.deployment(
        serve.ingress()(Gateway),
        name="gateway",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=config.limits.max_requests,
        max_queued_requests=config.limits.max_requests,
        graceful_shutdown_timeout_s=config.limits.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
    ).bind(engines, full, plain, str(root))


def _engines(
    replica: type,
    name: str,
    pool: ServedBase | ServedFull,
    engine: EngineConfig,
    limits: LimitsConfig,
) -> serve.Deployment:
    """A deployment of engines; its name stays the same wherever a base stands in the config."""
    rows = max(engine.row_buckets)
    router = {"num_free": max(1, rows // 2), "wait_s": limits.replica_wait_s}
    return serve.deployment(
        replica,
        name=name,
        **_replicas(pool.replicas),
        ray_actor_options={"num_cpus": pool.num_cpus, "num_gpus": _num_gpus(pool.num_gpus)},
        max_ongoing_requests=_most_images(engine) + 8,  # it queues by itself
        max_queued_requests=engine.max_queued_images,
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER, request_router_kwargs=router
        ),
        health_check_period_s=5,
        graceful_shutdown_timeout_s=limits.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
    )


def _most_images(engine: EngineConfig) -> int:
    """Images that wait and run in one engine at most."""
    return engine.max_queued_images + max(engine.row_buckets)


def _replicas(replicas: int | ReplicasConfig) -> dict[str, Any]:
    """Serve's options for a number of replicas, fixed or by the backlog."""
    if isinstance(replicas, int):
        return {"num_replicas": replicas}
    policy = AutoscalingPolicy(
        policy_function=POLICY, policy_kwargs={"target_backlog_s": replicas.target_backlog_s}
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            upscale_delay_s=replicas.upscale_delay_s,
            downscale_delay_s=replicas.downscale_delay_s,
            look_back_period_s=LOOK_BACK_S,
            policy=policy,
        )
    }


@contextmanager
def deployed(config: ServeConfig, root: Path, *, quiet: bool = True) -> Iterator[str]:
    """The endpoint, ready to answer at the URL that this gives, gone when the block ends.

    Uses the Ray of RAY_ADDRESS, the one this process is connected to, or an embedded one.
    Raises ClusterError when Ray cannot be reached, ServingError when the endpoint cannot start.
    """
    owns_ray, is_deployed = not ray.is_initialized(), False
    if quiet:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        if owns_ray:
            _connect()
        _start_proxies(config)
        args = {**config.model_dump(mode="json"), "home": str(root)}
        application = {
            "name": APPLICATION,
            "route_prefix": "/",
            "import_path": IMPORT_PATH,
            "args": args,
        }
        _client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))
        is_deployed = True
        _wait_until_running()
        yield f"http://{config.host}:{config.port}"
    finally:
        if is_deployed:
            serve.delete(APPLICATION)  # lets requests in progress end
        if owns_ray:
            ray.shutdown()


def check_running() -> None:
    """Raises ServingError once the endpoint has failed for good, ClusterError without Ray."""
    try:
        status = serve.status().applications[APPLICATION]
    except (RayError, KeyError, ConnectionError) as error:
        raise ClusterError("Ray has stopped", type(error).__name__, "serve again") from error
    if status.status == ApplicationStatus.DEPLOY_FAILED:
        raise ServingError("the endpoint cannot start", _reason(status), "see the reason above")


def _connect() -> None:
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        what, do = "Ray cannot be reached", "check RAY_ADDRESS, or unset it to start a Ray here"
    else:
        what, do = "Ray did not start here", "run it again when this machine is less busy"
        options |= {"include_dashboard": False, "object_store_memory": 200 * 2**20}
    for attempt in range(1 if address else START_ATTEMPTS):
        try:
            if address:
                _probe(address)
            ray.init(address=address or "local", **options)
            return
        except Exception as error:  # noqa: BLE001  as bare as Ray raises it where it is slow
            cause = error
            ray.shutdown()
            logger.warning("Ray did not start, attempt %d: %s", attempt + 1, error)
    raise ClusterError(what, " ".join(str(cause).split())[:200], do) from cause


def _probe(address: str) -> None:
    """Raises OSError when nobody listens; Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _start_proxies(config: ServeConfig) -> None:
    serve.start(
        http_options={"host": config.host, "port": config.port},
        proxy_location="HeadOnly",
        logging_config=LoggingConfig(log_level="WARNING"),
    )
    http = _client().http_config
    if (http.host, http.port) != (config.host, config.port):
        found = f"Ray Serve listens at {http.host}:{http.port} already"
        do = "serve at that address, or shut that Ray Serve down"
        raise ServingError(f"cannot serve at {config.host}:{config.port}", found, do)
    others = sorted(set(serve.status().applications) - {APPLICATION})
    if others:
        do = "deploy a config file that names them all with Ray's `serve deploy`"
        raise ServingError("this Ray serves other applications", ", ".join(others), do)


def _wait_until_running() -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        check_running()
        if serve.status().applications[APPLICATION].status == ApplicationStatus.RUNNING:
            return
        time.sleep(0.2)
    reason = _reason(serve.status().applications[APPLICATION])
    raise ServingError(f"the endpoint was not ready in {START_TIMEOUT_S:g} s", reason)


def _reason(status: Any) -> str:
    messages: list[str] = [status.message, *(each.message for each in status.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines()]
    named = [line for line in lines if line.startswith("raybooth")]
    return (named or [line for line in lines if line] or ["no reason given"])[-1][:400]


def _num_gpus(said: float | None) -> float:
    if said is not None:
        return said
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def _client() -> Any:
    from ray.serve.context import _get_global_client  # the only way to deploy a config in-process

    return _get_global_client()
