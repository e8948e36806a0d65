"""The HTTP face: OpenAI's routes over any backend, every answer and error in OpenAI's form."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from raybooth import __version__
from raybooth.config import AuthConfig, LimitsConfig
from raybooth.errors import NotPublishedError, RayBoothError, ServingError
from raybooth_serving.answers import (
    describe,
    on_any_error,
    on_http_error,
    on_raybooth_error,
    on_validation_error,
)
from raybooth_serving.api import (
    ErrorResponse,
    ImagesRequest,
    ImagesResponse,
    ModelCard,
    ModelList,
)
from raybooth_serving.auth import Gate, guest_of
from raybooth_serving.body import BodyLimit
from raybooth_serving.caller import Caller
from raybooth_serving.keys import Keyring
from raybooth_serving.streams import DONE, StreamEvent, sse, sse_error

logger = logging.getLogger(__name__)

NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""No proxy may hold events back."""


class Backend(Protocol):
    """What answers: a service in this process, or replicas behind a handle."""

    async def generate(self, request: ImagesRequest, caller: Caller) -> ImagesResponse: ...

    def stream(
        self, request: ImagesRequest, caller: Caller
    ) -> AsyncGenerator[StreamEvent, None]: ...

    async def models(self, with_versions: bool, caller: Caller) -> ModelList: ...

    async def metrics(self) -> dict[str, float]: ...

    async def check_health(self) -> None: ...


def make_app(
    backend: Backend,
    limits: LimitsConfig,
    keyring: Keyring | None = None,
    auth: AuthConfig | None = None,
) -> FastAPI:
    """The FastAPI application over `backend`, behind the gate (see auth.py)."""
    failures: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in ("4XX", "5XX")
    }
    app = FastAPI(
        title="RayBooth",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        dependencies=None if keyring is None else [Security(HTTPBearer(auto_error=False))],
        responses=failures,
        exception_handlers={
            RayBoothError: on_raybooth_error,
            RequestValidationError: on_validation_error,
            HTTPException: on_http_error,
            Exception: on_any_error,
        },
    )
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    app.add_middleware(Gate, keyring=keyring, config=auth or AuthConfig())  # last is outermost

    @app.post(
        "/v1/images/generations", response_model=ImagesResponse, response_model_exclude_none=True
    )
    async def generate(body: ImagesRequest, request: Request) -> ImagesResponse | StreamingResponse:
        guest = guest_of(request)
        caller = guest.caller()
        with guest.spending(body.n):
            if body.stream:
                return await _streamed(backend.stream(body, caller))
            return await backend.generate(body, caller)

    @app.get("/v1/models")
    async def models(request: Request, versions: bool = False) -> ModelList:
        return await backend.models(versions, guest_of(request).caller())

    @app.get("/v1/models/{model:path}")
    async def model(model: str, request: Request) -> ModelCard:
        listed = await backend.models(True, guest_of(request).caller())
        for card in listed.data:
            if card.id == model:
                return card
        raise NotPublishedError(f"no model {model!r} is served here", "", "see GET /v1/models")

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        try:
            await backend.check_health()
        except RayBoothError as error:
            logger.error("not healthy: %s", error)  # strangers may ask, and are not told why
            raise ServingError("this endpoint is not well", "", "its log says why") from error
        return {"status": "ok"}

    @app.get("/metrics.json")
    async def metrics() -> dict[str, float]:
        return await backend.metrics()

    return app


async def _streamed(events: AsyncGenerator[StreamEvent, None]) -> StreamingResponse:
    """The events as they come; what fails before the first is answered with its own status."""
    first = await anext(events)

    async def body() -> AsyncIterator[bytes]:
        async with aclosing(events):
            try:
                yield sse(first)
                async for event in events:
                    yield sse(event)
            except RayBoothError as error:
                yield sse_error(describe(error))
            yield DONE

    return StreamingResponse(body(), media_type="text/event-stream", headers=NO_CACHE)
