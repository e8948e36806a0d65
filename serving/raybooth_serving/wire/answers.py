"""Errors as OpenAI's clients expect them: status, headers, `{"error": {...}}`."""

from __future__ import annotations

import logging

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from raybooth.errors import (
    BaseModelError,
    InputError,
    NotPublishedError,
    RayBoothError,
    ServingError,
    StoreError,
)
from raybooth_serving.errors import (
    AuthError,
    DeadlineError,
    KeyReusedError,
    NoReplicaError,
    QueueFullError,
    ReplicaDiedError,
    TooLargeError,
)
from raybooth_serving.wire.api import ErrorDetail, ErrorResponse, ParameterError

logger = logging.getLogger(__name__)

STATUS: tuple[tuple[type[RayBoothError], int], ...] = (
    (AuthError, 401),
    (NotPublishedError, 404),
    (BaseModelError, 400),
    (TooLargeError, 413),
    (KeyReusedError, 422),
    (InputError, 400),
    (QueueFullError, 429),
    (DeadlineError, 504),
    (ServingError, 503),
    (StoreError, 503),
)
"""The HTTP status of each error; the first that fits."""

TYPES = {404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's `type` by status; other 4xx are invalid_request_error, 5xx server_error."""


def status_of(error: RayBoothError) -> int:
    """The HTTP status of `error`."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def describe(error: RayBoothError) -> ErrorResponse:
    """`error` in OpenAI's form."""
    param = error.param if isinstance(error, ParameterError) else None
    if isinstance(error, NotPublishedError | BaseModelError):
        param = "model"
    return _body(status_of(error), str(error), param, error.code)


def answer(error: RayBoothError) -> JSONResponse:
    """The response that `error` is."""
    status = status_of(error)
    headers: dict[str, str] = {}
    if isinstance(error, QueueFullError | NoReplicaError):
        headers["Retry-After"] = str(error.retry_after_s)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (500, 504) or isinstance(error, ReplicaDiedError):
        headers["x-should-retry"] = "false"  # the work would be done, and fail, three times
    return JSONResponse(describe(error).model_dump(), status, headers)


async def on_raybooth_error(request: Request, error: Exception) -> Response:
    """FastAPI's handler of our own errors."""
    assert isinstance(error, RayBoothError)
    return answer(error)


async def on_validation_error(request: Request, error: Exception) -> Response:
    """A body, query or header that does not fit its schema."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    if first["type"] == "json_invalid":
        message = f"the body is not JSON: {first['ctx']['error']}"
        return _response(400, message, None, "invalid_json")
    if isinstance(first.get("input"), bytes):
        message = "the body is not sent as JSON; set content-type: application/json"
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


async def on_http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        message = f"no route {request.method} {path}; see POST /v1/images/generations"
        return _response(404, message, None, "unknown_url")
    if error.status_code == 405:
        message = f"{path} does not take {request.method}"
        return _response(405, message, None, "method_not_allowed", dict(error.headers or {}))
    return _response(error.status_code, str(error.detail), None, "invalid_request")


async def on_any_error(request: Request, error: Exception) -> Response:
    """What nobody expected; the log has it, the answer does not."""
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
    return JSONResponse(_body(status, message, param, code).model_dump(), status, headers)


def _body(status: int, message: str, param: str | None, code: str) -> ErrorResponse:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=code))
