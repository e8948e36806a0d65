"""The HTTP face: OpenAI's routes over any backend, every answer and error in OpenAI's form."""

from __future__ import annotations

import logging
from typing import Any, Protocol

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from raybooth import __version__
from raybooth.config import AuthConfig, LimitsConfig
from raybooth.errors import NotPublishedError, RayBoothError, ServingError
from raybooth_serving.access.auth import Gate, guest_of
from raybooth_serving.access.keys import Keyring
from raybooth_serving.wire.answers import (
    on_any_error,
    on_http_error,
    on_raybooth_error,
    on_validation_error,
)
from raybooth_serving.wire.api import ModelCard, ModelList
from raybooth_serving.wire.body import BodyLimit, JsonRoute
from raybooth_serving.wire.caller import Caller
from raybooth_serving.wire.document import document, failures
from raybooth_serving.wire.generations import Draws, add_generations

logger = logging.getLogger(__name__)


class Backend(Draws, Protocol):
    """What answers: a service in this process, or replicas behind a handle."""

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
    app = FastAPI(
        title="RayBooth",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        dependencies=None if keyring is None else [Security(HTTPBearer(auto_error=False))],
        openapi_url=None,
        exception_handlers={
            RayBoothError: on_raybooth_error,
            RequestValidationError: on_validation_error,
            HTTPException: on_http_error,
            Exception: on_any_error,
        },
    )
    app.router.route_class = JsonRoute
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    app.add_middleware(Gate, keyring=keyring, config=auth or AuthConfig())  # last is outermost

    add_generations(app, backend, limits)

    @app.get("/v1/models", responses=failures(400))
    async def models(request: Request, versions: bool = False) -> ModelList:
        return await backend.models(versions, guest_of(request).caller())

    @app.get("/v1/models/{model:path}", responses=failures(404))
    async def model(model: str, request: Request) -> ModelCard:
        listed = await backend.models(True, guest_of(request).caller())
        for card in listed.data:
            if card.id == model:
                return card
        raise NotPublishedError(f"no model {model!r} is served here", "", "see GET /v1/models")

    @app.get("/healthz", responses=failures())
    async def healthz() -> dict[str, str]:
        try:
            await backend.check_health()
        except RayBoothError as error:
            logger.error("not healthy: %s", error)  # strangers may ask, and are not told why
            raise ServingError("this endpoint is not well", "", "its log says why") from error
        return {"status": "ok"}

    @app.get("/metrics.json", responses=failures())
    async def metrics() -> dict[str, float]:
        return await backend.metrics()

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return document(app)

    return app
