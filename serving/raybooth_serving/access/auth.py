"""The gate before every route: an API key, or a caller on this machine where none is asked for.

`Authorization: Bearer rb_...`. All but GET /healthz is behind it, routes that do not exist and the
OpenAPI document too. Without a keyring the gate lets in whoever speaks to a loopback name: a proxy
that passes strangers on, or a page that points its own name at this machine, names another host.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from raybooth.config import AuthConfig
from raybooth.errors import ConfigError, RayBoothError
from raybooth_serving.access.keys import FILE, KeyRecord, Keyring
from raybooth_serving.access.rates import Rates
from raybooth_serving.errors import AuthError, RateError, TooLargeError, UnfitImageError
from raybooth_serving.wire.answers import answer
from raybooth_serving.wire.caller import Caller

OPEN_PATH = "/healthz"
MAX_HEADER_BYTES = 16 * 1024
READ_TIMEOUT_S = 1.0
_DO = "send one of this endpoint's keys as `Authorization: Bearer rb_...`"


@dataclass(frozen=True, slots=True)
class Guest:
    """Whom the gate let in; `key` is None where no keys are asked for."""

    key: KeyRecord | None
    rates: Rates

    def caller(self) -> Caller:
        """What the engine may know of the guest."""
        if self.key is None:
            return Caller()
        return Caller(self.key.id, key_name=self.key.name, subjects=self.key.subjects)

    @contextmanager
    def spending(self, num_images: int) -> Iterator[None]:
        """Takes `num_images` of the key's rate; gives them back when none is made.

        Raises RateError. Pictures that were made and found unfit count.
        """
        rate = None if self.key is None else self.key.images_per_minute
        if self.key is None or rate is None:
            yield
            return
        wait_s = self.rates.take(self.key.id, num_images, rate, time.monotonic())
        if wait_s > 0:
            seconds = math.ceil(wait_s)
            found, do = f"{rate:g} images a minute", f"try again in {seconds} s"
            raise RateError("this API key has spent its rate", found, do, seconds)
        try:
            yield
        except UnfitImageError:
            raise
        except RayBoothError:
            self.rates.give_back(self.key.id, num_images)
            raise


class Gate:
    """ASGI: what comes in has shown a key of `keyring`, or came by a loopback name if None."""

    def __init__(self, app: ASGIApp, keyring: Keyring | None, config: AuthConfig) -> None:
        self.app = app
        self.keyring = keyring
        self.config = config
        self._rates = Rates()
        self._num_running: Counter[str] = Counter()
        self._reading: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer 401, 413 or 429 without reading its body."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["path"].removeprefix(scope.get("root_path", "")) == OPEN_PATH:
            await self.app(scope, receive, send)  # and no guest: who asks there may see nothing
            return
        try:
            key = await self._admit(scope)
        except RayBoothError as error:
            await answer(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["guest"] = Guest(key, self._rates)
        if key is None:
            await self.app(scope, receive, send)
            return
        self._num_running[key.id] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._num_running[key.id] -= 1
            self._num_running += Counter()  # drops zeros

    async def _admit(self, scope: Scope) -> KeyRecord | None:
        """The key of the request; None where no keys are asked for."""
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if size > MAX_HEADER_BYTES:
            do = f"send at most {MAX_HEADER_BYTES} bytes of them"
            raise TooLargeError("the request headers are too large", f"{size} bytes", do)
        if self.keyring is None:
            _check_host([value for name, value in headers if name == b"host"])
            return None
        given = [value for name, value in headers if name == b"authorization"]
        if len(given) != 1:
            raise AuthError("this needs an API key", f"{len(given)} in the request", _DO)
        scheme, _, secret = given[0].partition(b" ")
        await self._refresh(self.keyring)
        key = self.keyring.find(secret.strip())
        if key is None or scheme.lower() != b"bearer":
            raise AuthError("this API key is not known here", "", _DO)
        if key.is_expired(datetime.now(UTC)):
            raise AuthError("this API key has expired", "", "ask for another")
        if self._num_running[key.id] >= self.config.max_requests_per_key:
            found = f"{self.config.max_requests_per_key} in progress"
            raise RateError("this API key has too many requests", found, "let one end", 1)
        return key

    async def _refresh(self, keyring: Keyring) -> None:
        """Read the keys anew; a volume that does not answer holds one thread, and nobody long."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(asyncio.to_thread(keyring.refresh))
        await asyncio.wait({self._reading}, timeout=READ_TIMEOUT_S)


def guest_of(request: Request) -> Guest:
    """Whom the gate let in with `request`."""
    guest: Guest = request.state.guest
    return guest


def open_keyring(config: AuthConfig, host: str, root: Path) -> Keyring | None:
    """The keys that an endpoint at `host` asks for; None: it asks for none.

    Raises ConfigError when others could reach an endpoint that asks for none, or that has none to
    ask for; StoreError when they cannot be read.
    """
    is_local = is_loopback(host)
    if config.required == "never" and not is_local:
        do = "serve at 127.0.0.1, or leave auth.required out"
        raise ConfigError("others can reach this endpoint, so it needs API keys", host, do)
    if config.required != "always" and is_local:
        return None
    keyring = Keyring(root / FILE)
    if not keyring.read():
        what = f"an endpoint at {host} asks for API keys, and there are none"
        do = "make one: raybooth keys create NAME --subjects '*'"
        raise ConfigError(what, f"no keys in {keyring.path}", do)
    return keyring


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`, by its address or the name localhost."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _check_host(hosts: list[bytes]) -> None:
    for host in hosts:
        try:
            name = urlsplit(f"//{host.decode('latin-1')}").hostname or ""
        except ValueError:
            name = ""
        if not is_loopback(name):
            what = "without API keys this endpoint is for its own machine"
            do = "ask it as 127.0.0.1, or serve with auth.required: always and a key"
            raise AuthError(what, f"host {host.decode('latin-1')[:80]!r}", do)
