"""The endpoint on Ray Serve: an HTTP gateway before engine replicas, deployed by config.

`raybooth_serving.app:build` is the import path for Serve config files; its args are `config` (a
name or path of configs/serve) or ServeConfig's own keys, and `home` (default RAYBOOTH_HOME).
Requests of one subject go to one replica (consistent hashing by subject), which then holds its
adapter; others take over when it is full.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import BackpressureConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Gauge, Histogram
from ray.serve.schema import ApplicationStatus, LoggingConfig, ServeDeploySchema

from raybooth.config import ServeConfig, ServedBase, find_config, load_yaml, merge, parse_config
from raybooth.errors import ClusterError, RayBoothError, ServingError
from raybooth.home import home
from raybooth.store import Store
from raybooth_serving.api import ImagesRequest, ImagesResponse, ModelList
from raybooth_serving.auth import open_keyring
from raybooth_serving.caller import Caller
from raybooth_serving.errors import QueueFullError
from raybooth_serving.metrics import StepReport
from raybooth_serving.routes import make_app
from raybooth_serving.streams import StreamEvent

Result = TypeVar("Result")

APPLICATION = "raybooth"
IMPORT_PATH = "raybooth_serving.app:build"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
START_TIMEOUT_S = 600.0
START_ATTEMPTS = 3
"""A Ray of our own dies at birth where its agent takes over 15 s to start (2.60, busy machine)."""

logger = logging.getLogger(__name__)


class EngineReplica:
    """A service on the hardware of one Ray actor."""

    def __init__(self, config: Mapping[str, Any], root: str) -> None:
        parsed = parse_config(ServeConfig, config, "the engine's config")
        from raybooth_serving.service import Service  # torch is for engines, not for gateways

        self.service = Service.start(parsed, parsed.bases[0], Store(Path(root) / "models"))
        self.service.engine.metrics.observers.append(_StepMetrics())

    async def generate(self, request: ImagesRequest, caller: Caller) -> ImagesResponse:
        """See Service."""
        return await self.service.generate(request, caller)

    async def stream(
        self, request: ImagesRequest, caller: Caller
    ) -> AsyncGenerator[StreamEvent, None]:
        """See Service."""
        async with aclosing(self.service.stream(request, caller)) as events:
            async for event in events:
                yield event

    async def models(self, with_versions: bool, caller: Caller) -> ModelList:
        """See Service."""
        return await self.service.models(with_versions, caller)

    async def metrics(self) -> dict[str, float]:
        """Counters of this replica."""
        return await self.service.metrics()

    async def check_health(self) -> None:
        """Ray Serve replaces a replica whose engine has died."""
        await self.service.check_health()


class Gateway:
    """The HTTP routes; holds no weights."""

    def __init__(self, engine: DeploymentHandle[Any], config: Mapping[str, Any], root: str) -> None:
        self.config = parse_config(ServeConfig, config, "the gateway's config")
        self.backend = _Replicas(engine)
        host = _client().http_config.host  # where the proxies listen, whatever the config says
        self.keyring = open_keyring(self.config.auth, host, Path(root))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self.backend, self.config.limits, self.keyring, self.config.auth)


class _Replicas:
    """The engine deployment as a backend of the routes."""

    def __init__(self, engine: DeploymentHandle[Any]) -> None:
        self.engine = engine

    async def generate(self, request: ImagesRequest, caller: Caller) -> ImagesResponse:
        handle = self.engine.options(session_id=_session(request))
        answer: ImagesResponse = await _result(handle.generate.remote(request, caller))
        return answer

    async def stream(
        self, request: ImagesRequest, caller: Caller
    ) -> AsyncGenerator[StreamEvent, None]:
        handle = self.engine.options(session_id=_session(request), stream=True)
        events = handle.stream.remote(request, caller)
        try:
            while True:
                with _errors_as_raised():
                    event: StreamEvent = await anext(events)
                yield event
        except StopAsyncIteration:
            return
        finally:
            events.cancel()  # nothing if it has ended

    async def models(self, with_versions: bool, caller: Caller) -> ModelList:
        listed: ModelList = await _result(self.engine.models.remote(with_versions, caller))
        return listed

    async def metrics(self) -> dict[str, float]:
        counted: dict[str, float] = await _result(self.engine.metrics.remote())
        return counted

    async def check_health(self) -> None:
        await _result(self.engine.check_health.remote())


def _session(request: ImagesRequest) -> str:
    """Requests of the same subjects share a replica, which then holds their adapters."""
    return "+".join(request.subject_ids)


async def _result(response: Any) -> Any:
    """What a replica answered."""
    try:
        with _errors_as_raised():
            return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


@contextmanager
def _errors_as_raised() -> Iterator[None]:
    """A replica's own errors as they were raised there; Ray's as ours."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, RayBoothError):
            raise error.cause from None
        raise
    except BackPressureError as error:
        raise QueueFullError("the queue is full", "", "try again in 5 s", 5) from error
    except (DeploymentUnavailableError, RayError) as error:
        found = type(error).__name__
        raise ServingError("no engine replica can answer", found, "try again") from error


class _StepMetrics:
    """Each denoise step to Ray's Prometheus metrics."""

    def __init__(self) -> None:
        self.rows = Counter("raybooth_denoised_rows", "Image rows denoised.")
        self.steps = Counter("raybooth_denoise_steps", "Denoise steps.")
        self.waiting = Gauge("raybooth_images_waiting", "Images in the queue.")
        self.running = Gauge("raybooth_images_running", "Images in the batch.")
        self.subjects = Gauge("raybooth_subjects_per_step", "Subjects in the last denoise step.")
        bounds = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
        self.seconds = Histogram("raybooth_step_seconds", "Seconds a step.", boundaries=bounds)

    def __call__(self, report: StepReport) -> None:
        self.rows.inc(report.num_rows)
        self.steps.inc()
        self.waiting.set(report.num_waiting)
        self.running.set(report.num_running)
        self.subjects.set(report.num_subjects)
        self.seconds.observe(report.seconds)


def build(args: Mapping[str, Any]) -> serve.Application:
    """The Serve application of a serve config (see this file's top)."""
    values = dict(args)
    root = Path(values.pop("home", None) or home()).absolute()
    named = values.pop("config", None)
    if named is not None:
        values = merge(load_yaml(find_config("serve", named)) or {}, values)
    config = parse_config(ServeConfig, values, "serve args")
    plain = config.model_dump(mode="json")
    (served,) = config.bases
    queue = served.engine.max_queued_images
    engine = serve.deployment(
        EngineReplica,
        name="engine",
        num_replicas=served.replicas,
        ray_actor_options={"num_cpus": served.num_cpus, "num_gpus": _num_gpus(served)},
        max_ongoing_requests=queue + max(served.engine.row_buckets) + 8,  # it queues by itself
        max_queued_requests=queue,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        health_check_period_s=5,
    ).bind(plain, str(root))
    return serve.deployment(
        serve.ingress()(Gateway),
        name="gateway",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=config.limits.max_requests,
        max_queued_requests=config.limits.max_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
    ).bind(engine, plain, str(root))


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


def _num_gpus(served: ServedBase) -> float:
    if served.num_gpus is not None:
        return served.num_gpus
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def _client() -> Any:
    from ray.serve.context import _get_global_client  # the only way to deploy a config in-process

    return _get_global_client()
