"""`POST /v1/images/generations`: how long the caller waits, whether it asked before, the answer."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Protocol

from fastapi import FastAPI, Header, Request, Response
from fastapi.responses import StreamingResponse

from raybooth.config import LimitsConfig
from raybooth.errors import RayBoothError
from raybooth_serving.access.auth import Guest, guest_of
from raybooth_serving.wire.answers import describe
from raybooth_serving.wire.api import ImagesRequest, ImagesResponse, ParameterError
from raybooth_serving.wire.caller import Caller, patience_s
from raybooth_serving.wire.document import Responses, failures
from raybooth_serving.wire.idempotency import Answers, Sent
from raybooth_serving.wire.streams import DONE, StreamEvent, sse, sse_error

NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""No proxy may hold events back."""

STREAM: Responses = {
    200: {
        "description": "The images; with `stream: true` server-sent events of them.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "headers": {
            "Idempotent-Replayed": {
                "description": "`true`: the answer to an earlier request with the same key.",
                "schema": {"type": "string"},
            }
        },
    },
    **failures(400, 404, 422, 504),
}


class Draws(Protocol):
    """What the route asks: part of a backend."""

    async def generate(self, request: ImagesRequest, caller: Caller) -> ImagesResponse: ...

    def stream(
        self, request: ImagesRequest, caller: Caller
    ) -> AsyncGenerator[StreamEvent, None]: ...


def add_generations(app: FastAPI, backend: Draws, limits: LimitsConfig) -> None:
    """The route over `backend`, on `app`."""
    answers = Answers(limits.max_kept_answers, limits.max_kept_bytes, limits.keep_answers_s)

    @app.post("/v1/images/generations", response_model=ImagesResponse, responses=STREAM)
    async def generate(
        body: ImagesRequest,
        request: Request,
        idempotency_key: Annotated[
            str | None,
            Header(
                min_length=1,
                max_length=255,
                description="The same key and body are worked on once and answered alike.",
            ),
        ] = None,
        x_request_timeout_seconds: Annotated[
            float | None,
            Header(gt=0, allow_inf_nan=False, description="When the answer is worth nothing."),
        ] = None,
        x_stainless_read_timeout: Annotated[str | None, Header(include_in_schema=False)] = None,
        x_stainless_retry_count: Annotated[str | None, Header(include_in_schema=False)] = None,
    ) -> Response:
        guest = guest_of(request)
        read_timeout = None if body.stream else x_stainless_read_timeout
        deadline_s = patience_s(x_request_timeout_seconds, read_timeout)
        caller = replace(guest.caller(), deadline_s=deadline_s)
        if body.stream:
            if idempotency_key is not None:
                do = "leave one of the two out"
                raise ParameterError("stream", "a stream takes no Idempotency-Key", "both", do)
            with guest.spending(body.n):
                return await _streamed(backend.stream(body, caller))
        digest = hashlib.sha256(body.model_dump_json().encode()).hexdigest()
        is_retry = (x_stainless_retry_count or "0") != "0"
        sent = Sent(caller.tenant, digest, idempotency_key, is_retry)
        content, is_replayed = await answers.get(sent, lambda: _work(backend, body, caller, guest))
        headers = {"Idempotent-Replayed": "true"} if is_replayed else None
        return Response(content, headers=headers, media_type="application/json")


async def _work(backend: Draws, body: ImagesRequest, caller: Caller, guest: Guest) -> bytes:
    with guest.spending(body.n):
        answer = await backend.generate(body, caller)
    return answer.model_dump_json(exclude_none=True).encode()


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
