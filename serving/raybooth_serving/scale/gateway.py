"""The HTTP gateway on Ray Serve: routes before engine deployments, one for each base."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from fastapi import FastAPI
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from raybooth.config import ServeConfig, parse_config
from raybooth.errors import RayBoothError, ServingError
from raybooth.store import Store
from raybooth_serving.access.auth import open_keyring
from raybooth_serving.errors import NoReplicaError, QueueFullError, ReplicaDiedError
from raybooth_serving.metrics import merge
from raybooth_serving.names.catalog import Catalog
from raybooth_serving.names.lookup import Lookup
from raybooth_serving.scale.directory import find_engine
from raybooth_serving.scale.prometheus import GatewayCounts
from raybooth_serving.wire.api import ImagesRequest, ImagesResponse, ModelList, Note
from raybooth_serving.wire.caller import Caller
from raybooth_serving.wire.routes import make_app
from raybooth_serving.wire.streams import StreamEvent

Handle: TypeAlias = DeploymentHandle[Any]
RETRY_AFTER_S = 10
ASK_ALL_S = 5.0

logger = logging.getLogger(__name__)


class Gateway:
    """The HTTP routes; holds no weights."""

    def __init__(
        self,
        engines: Sequence[Handle],
        full: Handle | None,
        config: Mapping[str, Any],
        root: str,
    ) -> None:
        self.config = parse_config(ServeConfig, config, "the gateway's config")
        store, timeout_s = Store(Path(root) / "models"), self.config.limits.store_timeout_s
        self.backend = Engines(engines, full, store, Lookup(timeout_s))
        host = _get_global_client().http_config.host  # where the proxies listen, not what we say
        self.keyring = open_keyring(self.config.auth, host, Path(root))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self.backend, self.config.limits, self.keyring, self.config.auth)


class Engines:
    """The engine deployments as one backend of the routes."""

    def __init__(
        self, engines: Sequence[Handle], full: Handle | None, store: Store, lookup: Lookup
    ) -> None:
        self.engines = tuple(engines)
        self.full = full
        self.store = store
        self.lookup = lookup
        self.counts = GatewayCounts()
        self._catalog: Catalog | None = None
        self._forgetting: set[asyncio.Task[None]] = set()

    async def generate(self, request: ImagesRequest, caller: Caller) -> ImagesResponse:
        """The images; made a second time elsewhere if their replica dies."""
        call = await self._find(request, caller)
        try:
            with _errors_as_raised():
                answer: ImagesResponse = await _result(call.start("generate"))
        except ReplicaDiedError as error:
            self._note_again(call, error)
            with _errors_as_raised():
                answer = await _result(call.start("generate"))
        return answer

    async def stream(
        self, request: ImagesRequest, caller: Caller
    ) -> AsyncGenerator[StreamEvent, None]:
        """The events; begun again elsewhere if the replica dies before the first picture."""
        call = await self._find(request, caller)
        events = call.start("stream", stream=True)
        has_begun, is_second = False, False
        try:
            while True:
                try:
                    with _errors_as_raised():
                        event: StreamEvent = await anext(events)
                except StopAsyncIteration:
                    return
                except ReplicaDiedError as error:
                    if has_begun or is_second:
                        raise
                    self._note_again(call, error)
                    events, is_second = call.start("stream", stream=True), True
                    continue
                has_begun = has_begun or not isinstance(event, Note)
                yield event
        finally:
            events.cancel()  # nothing if it has ended

    async def models(self, with_versions: bool, caller: Caller) -> ModelList:
        """All models of all bases that the caller may see."""
        catalog = (await self._known()).seen_by(caller.subjects)
        return ModelList(data=await self.lookup.cards(catalog, with_versions))

    async def metrics(self) -> dict[str, float]:
        """Counters of all replicas of all bases, as one."""
        told = [answer for engine in self._all() for answer in await _ask_all(engine, "metrics")]
        counted = merge([answer for answer in told if not isinstance(answer, Exception)])
        if self._catalog is not None:  # names are asked for here first
            counted["store_away_requests"] = self._catalog.recall.metrics.store_away_requests
        return counted

    async def check_health(self) -> None:
        """Raises ServingError unless each base has a replica that can answer."""
        for engine in self._all():
            answers = await _ask_all(engine, "check_health")
            if all(isinstance(answer, Exception) for answer in answers):
                with _errors_as_raised():
                    raise answers[0]

    def _note_again(self, call: _Call, error: ReplicaDiedError) -> None:
        logger.warning("%s is made again: %s", call.request.model, error)
        self.counts.again.inc()

    def _all(self) -> tuple[Handle, ...]:
        return self.engines if self.full is None else (*self.engines, self.full)

    async def _find(self, request: ImagesRequest, caller: Caller) -> _Call:
        """The call of the engine that answers."""
        since = time.monotonic()
        catalog = (await self._known()).seen_by(caller.subjects)
        try:
            found = await self.lookup.ask(catalog, lambda it: find_engine(it, request))
        finally:
            self.counts.tell_away(catalog.recall.metrics.store_away_requests)
        if not found.is_full:
            return _Call(self.engines[found.base], found.session, found.request, caller, since)
        assert self.full is not None, "the catalog has full models only where they are served"
        return _Call(self.full, found.session, found.request, caller, since, (found.base,))

    async def _known(self) -> Catalog:
        """The catalog of all bases; the engines are asked once what they serve."""
        if self._catalog is None:
            with _errors_as_raised():
                asked = [_result(engine.describe.remote()) for engine in self.engines]
                bases = await asyncio.gather(*asked)
            loop = asyncio.get_running_loop()

            def forget(subject_id: str) -> None:
                loop.call_soon_threadsafe(self._forget, subject_id)

            serves_full = self.full is not None
            self._catalog = Catalog(self.store, bases, forget, serves_full=serves_full)
        return self._catalog

    def _forget(self, subject_id: str) -> None:
        """Tell every replica that a subject was deleted."""
        task = asyncio.create_task(self._tell_all(subject_id), name=f"forget-{subject_id}")
        self._forgetting.add(task)
        task.add_done_callback(self._forgetting.discard)

    async def _tell_all(self, subject_id: str) -> None:
        for engine in self._all():
            try:
                answers = await _ask_all(engine, "forget", subject_id)
            except ServingError as error:
                answers = [error]
            for answer in answers:
                if isinstance(answer, Exception):
                    logger.warning("a replica may still hold %s: %s", subject_id, answer)


@dataclass(frozen=True, slots=True)
class _Call:
    """What is asked of a replica, as often as it has to be."""

    engine: Handle
    session: str
    request: ImagesRequest
    caller: Caller
    since: float
    """time.monotonic() at its arrival."""

    place: tuple[int, ...] = ()
    """Of the base, where the engine has to be told."""

    def start(self, method: str, *, stream: bool = False) -> Any:
        """Ask now, with what is left of the caller's time."""
        handle = self.engine.options(method_name=method, session_id=self.session, stream=stream)
        caller = self.caller
        if caller.deadline_s is not None:
            left_s = caller.deadline_s - (time.monotonic() - self.since)
            caller = replace(caller, deadline_s=left_s)
        return handle.remote(self.request, caller, *self.place)


async def _result(response: Any) -> Any:
    """What a replica answered; a caller that leaves takes its request along."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


async def _ask_all(engine: Handle, method: str, *values: Any) -> list[Any]:
    """What each replica answers, or raises; NoReplicaError where there is none."""
    asked = engine.broadcast(method, *values)
    try:
        with _errors_as_raised():
            answers: list[Any] = await asked.results_async(
                timeout_s=ASK_ALL_S, return_exceptions=True
            )
    except TimeoutError as error:
        raise ServingError("a replica does not answer", method, "try again") from error
    return answers


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
    except DeploymentUnavailableError as error:
        do = f"try again in {RETRY_AFTER_S} s"
        raise NoReplicaError("no engine replica runs now", "", do, RETRY_AFTER_S) from error
    except RayActorError as error:
        found, do = type(error).__name__, f"try again in {RETRY_AFTER_S} s"
        what = "the engine replica died over the request"
        raise ReplicaDiedError(what, found, do, RETRY_AFTER_S) from error
    except RayError as error:
        found = type(error).__name__
        raise ServingError("no engine replica can answer", found, "try again") from error
