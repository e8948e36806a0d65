"""The HTTP face: OpenAI's routes over any backend, every answer and error in OpenAI's form."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raybooth import __version__
from raybooth.config import LimitsConfig
from raybooth.errors import (
    BaseModelError,
    InputError,
    NotPublishedError,
    RayBoothError,
    ServingError,
    StoreError,
)
from raybooth_serving.api import (
    ErrorDetail,
    ErrorResponse,
    ImagesRequest,
    ImagesResponse,
    ModelCard,
    ModelList,
    ParameterError,
)
from raybooth_serving.errors import DeadlineError, QueueFullError, TooLargeError

logger = logging.getLogger(__name__)

STATUS: tuple[tuple[type[RayBoothError], int], ...] = (
    (NotPublishedError, 404),
    (BaseModelError, 400),
    (TooLargeError, 413),
    (InputError, 400),
    (QueueFullError, 429),
    (DeadlineError, 504),
    (ServingError, 503),
    (StoreError, 503),
)
"""The HTTP status of each error; the first that fits."""

TYPES = {404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's `type` by status; other 4xx are invalid_request_error, 5xx server_error."""


class Backend(Protocol):
    """What answers: a service in this process, or replicas behind a handle."""

    async def generate(self, request: ImagesRequest) -> ImagesResponse: ...

    async def models(self, with_versions: bool) -> ModelList: ...

    async def metrics(self) -> dict[str, float]: ...

    async def check_health(self) -> None: ...


def make_app(backend: Backend, limits: LimitsConfig) -> FastAPI:
    """The FastAPI application over `backend`."""
    failures: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in ("4XX", "5XX")
    }
    app = FastAPI(
        title="RayBooth",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        responses=failures,
        exception_handlers={
            RayBoothError: _on_raybooth_error,
            RequestValidationError: _on_validation_error,
            HTTPException: _on_http_error,
            Exception: _on_any_error,
        },
    )
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)

    @app.post("/v1/images/generations", response_model_exclude_none=True)
    async def generate(body: ImagesRequest, request: Request) -> ImagesResponse:
        return await backend.generate(body)

    @app.get("/v1/models")
    async def models(versions: bool = False) -> ModelList:
        return await backend.models(versions)

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        listed = await backend.models(True)
        for card in listed.data:
            if card.id == model:
                return card
        raise NotPublishedError(f"no model {model!r} is served here", "", "see GET /v1/models")

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        await backend.check_health()
        return {"status": "ok"}

    @app.get("/metrics.json")
    async def metrics() -> dict[str, float]:
        return await backend.metrics()

    return app


def answer(error: RayBoothError) -> JSONResponse:
    """`error` as OpenAI's clients expect it."""
    status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
    headers: dict[str, str] = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(error.retry_after_s)
    if status in (500, 504):
        headers["x-should-retry"] = "false"  # the work would be done, and fail, three times
    param = error.param if isinstance(error, ParameterError) else None
    if isinstance(error, NotPublishedError | BaseModelError):
        param = "model"
    return _response(status, str(error), param, error.code, headers)


class BodyLimit:
    """Refuses request bodies over `max_bytes`, told or counted, with 413."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body up to the limit, then pass it on whole."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has left
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                what, do = "the request body is too large", f"send at most {self.max_bytes} bytes"
                error = TooLargeError(what, f"{len(body)} bytes or more", do)
                await answer(error)(scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        await self.app(scope, _replay(body, receive), send)


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    is_read = False

    async def read() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read


async def _on_raybooth_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RayBoothError)
    return answer(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        message = f"the body is not JSON: {first['ctx']['error']}"
        return _response(400, message, None, "invalid_json")
    param = ".".join(names) or None
    if first["type"] == "extra_forbidden":
        message = f"{param} is not a known parameter; remove it or check its spelling"
    elif first["type"] == "missing":
        message = f"{param or 'the body'} is missing; add it"
    else:
        found = repr(first.get("input"))
        message = f"{param or 'the body'}: {first['msg']} (found {found[:80]})"
    return _response(400, message, param, "invalid_request")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        message = f"no route {request.method} {path}; see POST /v1/images/generations"
        return _response(404, message, None, "unknown_url")
    if error.status_code == 405:
        message = f"{path} does not take {request.method}"
        return _response(405, message, None, "method_not_allowed", dict(error.headers or {}))
    return _response(error.status_code, str(error.detail), None, "invalid_request")


async def _on_any_error(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    message = "the endpoint failed; its log says why"
    return _response(500, message, None, "internal_error", {"x-should-retry": "false"})


def _response(
    status: int,
    message: str,
    param: str | None,
    code: str,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=code))
    return JSONResponse(body.model_dump(), status, headers)
