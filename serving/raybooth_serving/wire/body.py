"""Bodies of requests: no larger than the endpoint reads, JSON that says each thing once."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raybooth_serving.errors import TooLargeError
from raybooth_serving.wire.answers import answer


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


class JsonRoute(APIRoute):
    """A route whose body is JSON that says each thing once."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, with another reader of JSON."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return strict


class _JsonRequest(Request):
    async def json(self) -> Any:
        return read_json(await self.body())


def read_json(content: bytes) -> Any:
    """The value of `content`; raises JSONDecodeError, or HTTPException for worse."""
    try:
        return json.loads(content, object_pairs_hook=_unique)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise HTTPException(400, "the body is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise HTTPException(400, "the body is not UTF-8") from error
    except ValueError as error:
        raise HTTPException(400, "the body holds a number that is too long") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise HTTPException(400, f"the body says {name[:80]!r} twice; say it once")
        values[name] = value
    return values
