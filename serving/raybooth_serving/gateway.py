"""The HTTP gateway on Ray Serve: routes before engine deployments, one for each base."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from raybooth_serving.api import ImagesRequest, ImagesResponse, ModelList, Note
from raybooth_serving.auth import open_keyring
from raybooth_serving.caller import Caller
from raybooth_serving.catalog import Catalog
from raybooth_serving.directory import find_engine
from raybooth_serving.errors import NoReplicaError, QueueFullError, ReplicaDiedError
from raybooth_serving.metrics import merge
from raybooth_serving.routes import make_app
from raybooth_serving.streams import StreamEvent

Handle: TypeAlias = DeploymentHandle[Any]
RETRY_AFTER_S = 10

logger = logging.getLogger(__name__)


class Gateway:
    """The HTTP routes; holds no weights."""

    def __init__(self, engines: Sequence[Handle], config: Mapping[str, Any], root: str) -> None:
        self.config = parse_config(ServeConfig, config, "the gateway's config")
        self.backend = Engines(engines, Store(Path(root) / "models"))
        host = _get_global_client().http_config.host  # where the proxies listen, not what we say
        self.keyring = open_keyring(self.config.auth, host, Path(root))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self.backend, self.config.limits, self.keyring, self.config.auth)


class Engines:
    """The engine deployments as one backend of the routes."""

    def __init__(self, engines: Sequence[Handle], store: Store) -> None:
        self.engines = tuple(engines)
        self.store = store
        self._catalog: Catalog | None = None
        self._forgetting: set[asyncio.Task[None]] = set()

    async def generate(self, request: ImagesRequest, caller: Caller) -> ImagesResponse:
        """The images; made a second time elsewhere if their replica dies."""
        since = time.monotonic()
        handle, pinned = await self._find(request, caller)
        try:
            with _errors_as_raised():
                answer: ImagesResponse = await _result(handle.generate.remote(pinned, caller))
        except ReplicaDiedError as error:
            logger.warning("%s is made again: %s", pinned.model, error)
            with _errors_as_raised():
                left = _later(caller, since)
                answer = await _result(handle.generate.remote(pinned, left))
        return answer

    async def stream(
        self, request: ImagesRequest, caller: Caller
    ) -> AsyncGenerator[StreamEvent, None]:
        """The events; begun again elsewhere if the replica dies before the first of them."""
        since = time.monotonic()
        handle, pinned = await self._find(request, caller)
        handle = handle.options(stream=True)
        events = handle.stream.remote(pinned, caller)
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
                    logger.warning("%s is begun again: %s", pinned.model, error)
                    events, is_second = handle.stream.remote(pinned, _later(caller, since)), True
                    continue
                has_begun = has_begun or not isinstance(event, Note)
                yield event
        finally:
            events.cancel()  # nothing if it has ended

    async def models(self, with_versions: bool, caller: Caller) -> ModelList:
        """All models of all bases that the caller may see."""
        catalog = (await self._known()).seen_by(caller.subjects)
        cards = await asyncio.to_thread(catalog.cards, with_versions=with_versions)
        return ModelList(data=cards)

    async def metrics(self) -> dict[str, float]:
        """Counters of all replicas of all bases, as one."""
        told = [answer for engine in self.engines for answer in await _ask_all(engine, "metrics")]
        counted = merge([answer for answer in told if not isinstance(answer, Exception)])
        if self._catalog is not None:  # names are asked for here first
            counted["store_away_requests"] = self._catalog.recall.metrics.store_away_requests
        return counted

    async def check_health(self) -> None:
        """Raises ServingError unless each base has a replica that can answer."""
        for engine in self.engines:
            answers = await _ask_all(engine, "check_health")
            if all(isinstance(answer, Exception) for answer in answers):
                with _errors_as_raised():
                    raise answers[0]

    async def _find(self, request: ImagesRequest, caller: Caller) -> tuple[Handle, ImagesRequest]:
        """The engine that answers, and the request with its versions pinned."""
        catalog = (await self._known()).seen_by(caller.subjects)
        found = await asyncio.to_thread(find_engine, catalog, request)
        return self.engines[found.base].options(session_id=found.session), found.request

    async def _known(self) -> Catalog:
        """The catalog of all bases; the engines are asked once what they serve."""
        if self._catalog is None:
            with _errors_as_raised():
                asked = [_result(engine.describe.remote()) for engine in self.engines]
                bases = await asyncio.gather(*asked)
            loop = asyncio.get_running_loop()

            def forget(subject_id: str) -> None:
                loop.call_soon_threadsafe(self._forget, subject_id)

            self._catalog = Catalog(self.store, bases, forget)
        return self._catalog

    def _forget(self, subject_id: str) -> None:
        """Tell every replica that a subject was deleted."""
        task = asyncio.create_task(self._tell_all(subject_id), name=f"forget-{subject_id}")
        self._forgetting.add(task)
        task.add_done_callback(self._forgetting.discard)

    async def _tell_all(self, subject_id: str) -> None:
        for engine in self.engines:
            answers = await _ask_all(engine, "forget", subject_id)
            for answer in answers:
                if isinstance(answer, Exception):
                    logger.warning("a replica may still hold %s: %s", subject_id, answer)


def _later(caller: Caller, since: float) -> Caller:
    """`caller` with what is left of its deadline."""
    if caller.deadline_s is None:
        return caller
    return replace(caller, deadline_s=caller.deadline_s - (time.monotonic() - since))


async def _result(response: Any) -> Any:
    """What a replica answered; a caller that leaves takes its request along."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


async def _ask_all(engine: Handle, method: str, *values: Any) -> list[Any]:
    """What each replica answers, or raises; NoReplicaError where there is none."""
    with _errors_as_raised():
        asked = engine.broadcast(method, *values)
        answers: list[Any] = await asked.results_async(timeout_s=5, return_exceptions=True)
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
