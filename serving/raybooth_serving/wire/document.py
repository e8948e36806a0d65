"""The OpenAPI document: the statuses that each route really answers, in OpenAI's form of errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from raybooth_serving.wire.api import ErrorResponse

Responses = dict[int | str, dict[str, Any]]

ALWAYS = (401, 413, 429, 500, 503)
"""A wrong key, headers too large, too many requests, our own fault, no replica."""

RETRY_AFTER = {"description": "Seconds until it may work.", "schema": {"type": "integer"}}
SHOULD_RETRY = {"description": "`false`: the work was begun.", "schema": {"type": "string"}}
HEADERS = {
    429: {"Retry-After": RETRY_AFTER},
    500: {"x-should-retry": SHOULD_RETRY},
    503: {"Retry-After": RETRY_AFTER, "x-should-retry": SHOULD_RETRY},
    504: {"x-should-retry": SHOULD_RETRY},
}


def failures(*statuses: int) -> Responses:
    """`statuses`, and those that every route answers."""
    return {
        status: {"model": ErrorResponse, "headers": HEADERS.get(status, {})}
        for status in sorted({*ALWAYS, *statuses})
    }


def document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document without its own form of 422 and null in headers: there is neither."""
    whole = app.openapi()
    for operations in whole["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422", "")):
                del operation["responses"]["422"]
            for parameter in operation.get("parameters", ()):
                kinds = parameter["schema"].pop("anyOf", [{}])
                parameter["schema"] |= kinds[0]
    for name in ("HTTPValidationError", "ValidationError"):
        whole["components"]["schemas"].pop(name, None)
    return whole
