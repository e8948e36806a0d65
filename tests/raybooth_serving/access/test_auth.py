"""The gate: every route with every wrong key, what a key may see and how much, and this machine."""

from __future__ import annotations

import base64
import logging
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from openai import AuthenticationError, OpenAI
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from raybooth.config import (
    AuthConfig,
    EngineConfig,
    LimitsConfig,
    SamplingDefaults,
    ServeConfig,
    ServedBase,
)
from raybooth.errors import ConfigError, StoreError
from raybooth.model.base import Base
from raybooth.store import Store
from raybooth_serving.access.auth import MAX_HEADER_BYTES, open_keyring
from raybooth_serving.access.keys import Keyring, hash_secret
from raybooth_serving.errors import RateError
from raybooth_serving.service import Service
from raybooth_serving.wire.routes import make_app
from tests.raybooth_serving.conftest import SUBJECTS
from tests.raybooth_serving.published import publish

ROUTE = "/v1/images/generations"
SERVED = ServedBase(
    engine=EngineConfig(num_slots=2, max_rank=4, row_buckets=(1, 2), max_queued_images=8),
    defaults=SamplingDefaults(num_inference_steps=2, guidance_scale=1),
)
CONFIG = ServeConfig(bases=(SERVED,), limits=LimitsConfig(max_body_bytes=4096))
AUTH = AuthConfig(max_requests_per_key=2)


@dataclass
class Guarded:
    """An endpoint behind keys."""

    client: TestClient
    ring: Keyring
    store: Store
    service: Service

    def ask(self, method: str, path: str, secret: str | None = None, **more: Any) -> Any:
        headers = {} if secret is None else {b"Authorization": f"Bearer {secret}".encode()}
        return self.client.request(method, path, headers=headers, **more)

    def draw(self, secret: str, model: str = "dog-a", **more: Any) -> Any:
        body = {"model": model, "prompt": "a dog", **more}
        return self.ask("POST", ROUTE, secret, json=body)


def _guard(base: Base, store: Store) -> Iterator[Guarded]:
    ring = Keyring(store.root.parent / "keys.json")
    service = Service(base, store, CONFIG, SERVED)
    app = make_app(service, CONFIG.limits, ring, AUTH)
    with TestClient(app, base_url="http://booth.example", raise_server_exceptions=False) as client:
        yield Guarded(client, ring, store, service)
        assert client.portal is not None
        client.portal.call(service.engine.close)


@pytest.fixture(scope="module")
def shared(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    store = Store(tmp_path_factory.mktemp("booth") / "models")
    for seed, subject_id in enumerate(SUBJECTS):
        publish(store, base, subject_id, seed)
    store.set_alias("dog-a", "best", 1)
    yield from _guard(base, store)


@pytest.fixture
def booth(shared: Guarded) -> Guarded:
    """The subjects of conftest.py; no keys yet."""
    shared.ring.path.unlink(missing_ok=True)
    return shared


@pytest.fixture
def dogless(base: Base, tmp_path: Path) -> Iterator[Guarded]:
    """An endpoint where there are no dogs."""
    store = Store(tmp_path / "dogless" / "models")
    publish(store, base, "robot-c", 2)
    yield from _guard(base, store)


def _error(answer: Any) -> dict[str, Any]:
    assert list(answer.json()) == ["error"]
    return dict(answer.json()["error"])


# ------------------------------------------------------------------ every route, every wrong key


def _every_call(client: TestClient) -> list[tuple[str, str]]:
    """Each method of each route there is, and some that are not."""
    app: Any = client.app
    calls = {("GET", "/"), ("GET", "/docs"), ("POST", "/v1/images/edits"), ("GET", "/healthz/")}
    calls |= {("GET", "//healthz"), ("GET", "/v1/../healthz/x"), ("GET", "/HEALTHZ")}
    for route in app.routes:
        assert isinstance(route, Route)
        path = re.sub(r"\{.*?\}", "dog-a", route.path)
        for method in {*(route.methods or ()), "OPTIONS", "HEAD", "DELETE"}:
            calls.add((method, path))
    return sorted(call for call in calls if call[1] != "/healthz")


def _wrong_keys(ring: Keyring) -> dict[str, str | None]:
    _, good = ring.create("good", subjects=["*"])
    _, revoked = ring.create("revoked", subjects=["*"])
    ring.revoke("revoked")
    expired, old = ring.create("old", subjects=["*"], expires=datetime(2099, 1, 1, tzinfo=UTC))
    ring.path.write_text(ring.path.read_text().replace("2099", "2020"))
    return {
        "no key": None,
        "empty": "",
        "wrong": "rb_" + "x" * 43,
        "one letter off": good[:-1] + ("a" if good[-1] != "a" else "b"),
        "two keys": f"{good} {good}",
        "its hash": hash_secret(good.encode()),
        "its id": expired.id,
        "not ASCII": "rb_\xe9",
        "revoked": revoked,
        "expired": old,
    }


def test_every_route_refuses_every_wrong_key(booth: Guarded) -> None:
    calls, keys = _every_call(booth.client), _wrong_keys(booth.ring)
    assert {("POST", ROUTE), ("GET", "/v1/models"), ("GET", "/metrics.json")} <= set(calls)
    assert ("GET", "/openapi.json") in calls
    for method, path in calls:
        for name, secret in keys.items():
            answer = booth.ask(method, path, secret)
            case = f"{method} {path} with {name}"
            assert answer.status_code == 401, case
            assert answer.headers["www-authenticate"] == "Bearer", case
            if method != "HEAD":
                error = _error(answer)
                assert (error["code"], error["param"]) == ("invalid_api_key", None), case
    for header in ("", "Bearer", "Basic x", "rb_"):
        answer = booth.client.get("/v1/models", headers={"Authorization": header})
        assert answer.status_code == 401, header


def test_what_is_wrong_with_a_key_is_not_told(booth: Guarded) -> None:
    keys = _wrong_keys(booth.ring)
    told = {name: booth.ask("GET", "/v1/models", key).text for name, key in keys.items() if key}
    assert "expired" in told.pop("expired"), "only its owner can know"
    assert len(set(told.values())) == 1


def test_every_route_lets_a_good_key_in(booth: Guarded) -> None:
    _, good = booth.ring.create("good", subjects=["*"])
    for method, path in _every_call(booth.client):
        assert booth.ask(method, path, good).status_code != 401, (method, path)
    assert booth.draw(good).status_code == 200
    lower = {"Authorization": f"bearer  {good}"}
    assert booth.client.get("/v1/models", headers=lower).status_code == 200
    document = booth.ask("GET", "/openapi.json", good).json()
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"


def test_two_authorizations_are_none(booth: Guarded) -> None:
    _, good = booth.ring.create("good")
    headers = [("Authorization", f"Bearer {good}"), ("Authorization", "Bearer rb_x")]
    assert booth.client.get("/v1/models", headers=headers).status_code == 401


def test_health_is_open_and_tells_nothing(dogless: Guarded) -> None:
    booth = dogless
    for method, status in (("GET", 200), ("POST", 405), ("OPTIONS", 405)):
        assert booth.ask(method, "/healthz").status_code == status
    assert booth.ask("GET", "/healthz").json() == {"status": "ok"}
    _, good = booth.ring.create("good", subjects=["*"])
    booth.service.engine._tick.shutdown()  # as if the thread had died
    assert "found RuntimeError" in _error(booth.draw(good, "tiny"))["message"]
    ill = booth.ask("GET", "/healthz")
    assert ill.status_code == 503
    assert _error(ill)["message"] == "this endpoint is not well; its log says why"


def test_sockets_are_closed(booth: Guarded) -> None:
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        booth.client.websocket_connect("/v1/models"),
    ):
        pass
    assert closed.value.code == 1008


def test_a_large_body_without_a_key_is_not_read(booth: Guarded) -> None:
    assert booth.ask("POST", ROUTE, content=b"x" * 5000).status_code == 401


def test_the_openai_client_understands(booth: Guarded) -> None:
    http: Any = booth.client
    _, good = booth.ring.create("good", subjects=["dog-*"])
    url = "http://booth.example/v1"
    client = OpenAI(base_url=url, api_key=good, http_client=http, max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny", "dog-a", "dog-b"]
    booth.ring.revoke("good")
    with pytest.raises(AuthenticationError, match="not known here") as error:
        client.models.list()
    assert error.value.code == "invalid_api_key"


# ------------------------------------------------------------------ what a key may see


def test_subjects_of_others_are_as_if_they_were_not_there(booth: Guarded, dogless: Guarded) -> None:
    _, here = booth.ring.create("robots", subjects=["robot-*"])
    _, there = dogless.ring.create("all", subjects=["*"])
    labels = ("", "@1", "@9", "@latest", "@best", "@preview", "@", "@1@2")
    models = [f"dog-a{label}" for label in labels]
    models += ["dog-b", "dgo-a", "dog-x", "vase-d@1", "tinny", "robot-d"]
    for model in models:
        for ask in (
            lambda guarded, secret, model=model: guarded.draw(secret, model),
            lambda guarded, secret, model=model: guarded.draw(secret, model, stream=True),
            lambda guarded, secret, model=model: guarded.ask("GET", f"/v1/models/{model}", secret),
            lambda guarded, secret, model=model: guarded.draw(
                secret, "tiny", adapters=[{"subject": "robot-c"}, {"subject": model}]
            ),
        ):
            found, expected = ask(booth, here), ask(dogless, there)
            assert found.status_code == expected.status_code == 404, model
            assert found.content == expected.content
            assert sorted(found.headers) == sorted(expected.headers)


def test_what_a_key_may_see_it_lists_and_draws(booth: Guarded) -> None:
    _, secret = booth.ring.create("robots", subjects=["robot-*", "vase-?"])
    listed = booth.ask("GET", "/v1/models?versions=true", secret).json()["data"]
    assert [c["id"] for c in listed] == ["tiny", "robot-c", "robot-c@1", "vase-d", "vase-d@1"]
    for model in ("tiny", "robot-c", "vase-d@1"):
        assert booth.draw(secret, model).status_code == 200
    _, nothing = booth.ring.create("nothing")
    assert [c["id"] for c in booth.ask("GET", "/v1/models", nothing).json()["data"]] == ["tiny"]


def test_a_revoked_key_ends_at_once(booth: Guarded) -> None:
    _, secret = booth.ring.create("studio", subjects=["*"])
    assert booth.draw(secret).status_code == 200
    booth.ring.revoke("studio")
    assert booth.draw(secret).status_code == 401


def test_a_volume_that_does_not_answer_stops_no_key(
    booth: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raybooth_serving.access.auth.READ_TIMEOUT_S", 0.05)
    _, good = booth.ring.create("good", subjects=["*"])
    assert booth.ask("GET", "/v1/models", good).status_code == 200
    path = booth.ring.path
    path.rename(path.with_name("aside"))
    os.mkfifo(path)  # who reads it waits for a writer
    try:
        for _ in range(3):
            assert booth.ask("GET", "/v1/models", good).status_code == 200
            assert booth.ask("GET", "/v1/models", f"{good}x").status_code == 401
    finally:
        os.close(os.open(path, os.O_WRONLY))
        path.with_name("aside").replace(path)
    booth.ring.revoke("good")
    statuses = [booth.ask("GET", "/v1/models", good).status_code for _ in range(50)]
    assert statuses[-1] == 401


def test_secrets_are_in_no_log_and_no_answer(
    booth: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    key, secret = booth.ring.create("studio", subjects=["dog-*"], images_per_minute=2)
    caplog.set_level(logging.DEBUG)
    answers = [booth.draw(secret, model, n=n) for model, n in (("dog-a", 2), ("x", 1), ("x", 9))]
    answers += [booth.ask("GET", path, secret) for path in ("/metrics.json", "/v1/models", "/")]
    answers += [booth.ask("GET", "/v1/models", f"{secret}x")]
    for text in (caplog.text, *(f"{each.headers}{each.text}" for each in answers)):
        assert secret not in text
        assert hash_secret(secret.encode()) not in text
    picture = base64.b64decode(answers[0].json()["data"][0]["b64_json"])
    assert b"raybooth:receipt" in picture
    for told in (secret, key.id, key.name):
        assert told.encode() not in picture


# ------------------------------------------------------------------ how much


def test_over_its_rate_a_key_is_told_when(booth: Guarded) -> None:
    _, slow = booth.ring.create("slow", subjects=["*"], images_per_minute=4)
    _, other = booth.ring.create("other", subjects=["*"], images_per_minute=4)
    assert booth.draw(slow, n=4).status_code == 200
    for more in ({}, {"stream": True}):
        answer = booth.draw(slow, n=2, **more)
        assert answer.status_code == 429
        assert _error(answer)["code"] == RateError.code
        assert 25 <= int(answer.headers["retry-after"]) <= 30, "two images at 15 s each"
    assert booth.draw(other).status_code == 200
    assert booth.ask("GET", "/v1/models", slow).status_code == 200, "looking is free"


def test_requests_that_made_nothing_are_free(booth: Guarded) -> None:
    _, slow = booth.ring.create("slow", subjects=["*"], images_per_minute=2)
    for wrong in ({"model": "nobody"}, {"n": 9, "size": "17x17"}, {"prompt": ""}, {"n": 10}):
        assert booth.draw(slow, **wrong).status_code in (400, 404, 429)
    assert booth.draw(slow, n=2).status_code == 200
    assert booth.draw(slow).status_code == 429


def test_a_key_has_few_requests_in_progress(booth: Guarded) -> None:
    _, busy = booth.ring.create("busy", subjects=["*"])
    _, other = booth.ring.create("other", subjects=["*"])
    with ThreadPoolExecutor(6) as threads:
        drawn = [
            threads.submit(booth.draw, busy, num_inference_steps=30, stream=index % 2 == 0)
            for index in range(5)
        ]
        drawn.append(threads.submit(booth.draw, other))
        statuses = [each.result().status_code for each in drawn]
    assert statuses[-1] == 200
    assert sorted(statuses[:-1]) == [200, 200, 429, 429, 429]
    assert booth.draw(busy).status_code == 200, "ended requests are not counted"


def test_a_key_with_one_image_goes_before_the_rest_of_one_with_many(booth: Guarded) -> None:
    _, many = booth.ring.create("many", subjects=["*"])
    _, few = booth.ring.create("few", subjects=["*"])
    already = booth.service.engine.metrics.denoise_steps
    ended: list[str] = []

    def draw(name: str, secret: str, n: int) -> int:
        answer = booth.draw(secret, n=n, num_inference_steps=15)
        ended.append(name)
        return int(answer.status_code)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(draw, "many", many, 6)
        while booth.service.engine.metrics.denoise_steps < already + 2:
            time.sleep(0.01)
        second = threads.submit(draw, "few", few, 1)
        assert (first.result(), second.result()) == (200, 200)
    assert ended == ["few", "many"]


def test_large_headers_are_refused(booth: Guarded) -> None:
    _, good = booth.ring.create("good")
    headers = {"Authorization": f"Bearer {good}", "x-large": "x" * MAX_HEADER_BYTES}
    answer = booth.client.get("/v1/models", headers=headers)
    assert answer.status_code == 413
    assert "headers are too large" in _error(answer)["message"]


def test_other_origins_get_no_leave(booth: Guarded) -> None:
    _, good = booth.ring.create("good", subjects=["*"])
    asked = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for secret, status in ((good, 405), (None, 401)):
        key = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        headers = {**asked, **key}
        answers = [booth.client.options(path, headers=headers) for path in (ROUTE, "/v1/models")]
        answers.append(booth.client.get("/v1/models", headers=headers))
        assert [each.status_code for each in answers[:2]] == [status] * 2
        for answer in answers:
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_bodies_that_a_page_could_send_unasked_are_refused(booth: Guarded) -> None:
    _, good = booth.ring.create("good", subjects=["*"])
    body = b'{"model": "dog-a", "prompt": "a dog"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        headers = {"Authorization": f"Bearer {good}", "Content-Type": kind}
        assert booth.client.post(ROUTE, content=body, headers=headers).status_code == 400, kind


# ------------------------------------------------------------------ without keys


@pytest.fixture
def local(shared: Guarded) -> TestClient:
    """The same service, without keys."""
    return TestClient(make_app(shared.service, CONFIG.limits), base_url="http://127.0.0.1:8000")


def test_without_keys_only_this_machine_is_answered(local: TestClient) -> None:
    for host in ("127.0.0.1", "localhost:8000", "[::1]:8000", "LOCALHOST", "127.8.9.1"):
        assert local.get("/v1/models", headers={"Host": host}).status_code == 200, host
    for host in ("booth.example", "10.0.0.1:8000", "localhost.example", "0.0.0.0", "[", ""):
        answer = local.get("/v1/models", headers={"Host": host})
        assert answer.status_code == 401, host
        assert "own machine" in _error(answer)["message"]
        assert local.get("/healthz", headers={"Host": host}).status_code == 200


def test_any_key_is_taken_where_none_is_asked_for(local: TestClient) -> None:
    answer = local.get("/v1/models", headers={"Authorization": "Bearer any"})
    assert len(answer.json()["data"]) == 5


@pytest.mark.parametrize(
    ("required", "host", "expected"),
    [
        ("auto", "127.0.0.1", "open"),
        ("auto", "localhost", "open"),
        ("auto", "::1", "open"),
        ("never", "127.0.0.1", "open"),
        ("never", "0.0.0.0", "needs API keys"),
        ("never", "booth.example", "needs API keys"),
        ("auto", "0.0.0.0", "raybooth keys create"),
        ("auto", "::", "raybooth keys create"),
        ("auto", "", "raybooth keys create"),
        ("auto", "10.0.0.1", "raybooth keys create"),
        ("always", "127.0.0.1", "raybooth keys create"),
    ],
)
def test_keys_are_off_for_loopback_hosts_only(
    tmp_path: Path, required: Any, host: str, expected: str
) -> None:
    config = AuthConfig(required=required)
    if expected == "open":
        assert open_keyring(config, host, tmp_path) is None
        return
    with pytest.raises(ConfigError, match=expected):
        open_keyring(config, host, tmp_path)
    Keyring(tmp_path / "keys.json").create("one")
    if required == "never":
        with pytest.raises(ConfigError, match=expected):
            open_keyring(config, host, tmp_path)
    else:
        assert open_keyring(config, host, tmp_path) is not None
        (tmp_path / "keys.json").write_text("{")
        with pytest.raises(StoreError, match="not a file of keys"):
            open_keyring(config, host, tmp_path)
