"""The HTTP face over a real service, without Ray, spoken to by the `openai` client."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from PIL import Image
from starlette.testclient import TestClient

from raybooth.config import EngineConfig, LimitsConfig, SamplingDefaults, ServeConfig, ServedBase
from raybooth.model.base import Base
from raybooth.store import RECORD, Store
from raybooth_serving.service import Service
from raybooth_serving.wire.routes import make_app
from tests.raybooth_serving.conftest import SUBJECTS
from tests.raybooth_serving.published import publish, weights_of

PROMPT = "a photo of sks dog"
ROUTE = "/v1/images/generations"
SERVED = ServedBase(
    engine=EngineConfig(num_slots=2, max_rank=4, row_buckets=(1, 2, 4), max_queued_images=8),
    defaults=SamplingDefaults(num_inference_steps=3),
)
CONFIG = ServeConfig(
    bases=(SERVED,),
    limits=LimitsConfig(max_body_bytes=4096, max_images=10, max_prompt_characters=600),
)


@pytest.fixture
def client(base: Base, store: Store) -> Iterator[TestClient]:
    service = Service(base, store, CONFIG, SERVED)
    app = make_app(service, CONFIG.limits)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client
        assert client.portal is not None
        client.portal.call(service.engine.close)


@pytest.fixture
def openai_client(client: TestClient) -> OpenAI:
    http: Any = client
    return OpenAI(base_url="http://localhost/v1", api_key="x", http_client=http, max_retries=0)


def image(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


def post(client: TestClient, **body: Any) -> Any:
    return client.post(ROUTE, json={"model": "dog-a", "prompt": PROMPT, **body})


def error_of(response: Any) -> dict[str, Any]:
    """The error of an answer, which must be in OpenAI's form and nothing else."""
    body = response.json()
    assert list(body) == ["error"], body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return dict(body["error"])


def test_the_plain_openai_client_generates(openai_client: OpenAI) -> None:
    answer = openai_client.images.generate(model="dog-a", prompt=PROMPT, n=2, size="16x24")
    assert answer.created > 0
    assert answer.data is not None
    assert len(answer.data) == 2
    assert [image(each.b64_json).size for each in answer.data] == [(16, 24)] * 2
    assert answer.output_format == "png"
    assert answer.size == "16x24"


def test_our_own_parameters_travel_in_extra_body(openai_client: OpenAI) -> None:
    extra: dict[str, Any] = {
        "seed": 7,
        "num_inference_steps": 5,
        "guidance_scale": 3,
        "negative_prompt": "red",
        "solver": "euler",
        "adapter_scale": 0.5,
    }

    def draw(**changed: Any) -> Any:
        body = {**extra, **changed}
        answer = openai_client.images.generate(model="robot-c@1", prompt=PROMPT, extra_body=body)
        assert answer.data is not None
        return answer.data[0]

    first = draw()
    assert first.model_extra is not None
    assert first.model_extra["seed"] == first.model_extra["receipt"]["seed"] == 7
    assert draw().b64_json == first.b64_json
    for changed in ({"seed": 8}, {"adapter_scale": 1.0}, {"solver": "ddim"}):
        assert draw(**changed).b64_json != first.b64_json, changed


def test_image_i_has_seed_plus_i(openai_client: OpenAI) -> None:
    many = openai_client.images.generate(model="dog-b", prompt=PROMPT, n=2, extra_body={"seed": 5})
    one = openai_client.images.generate(model="dog-b", prompt=PROMPT, extra_body={"seed": 6})
    assert many.data is not None
    assert one.data is not None
    assert [each.model_dump()["seed"] for each in many.data] == [5, 6]
    pairs = zip(*(image(d.b64_json).tobytes() for d in (many.data[1], one.data[0])), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1  # buckets of two and of one row


def test_a_seed_is_drawn_and_told(client: TestClient) -> None:
    seeds = {post(client).json()["data"][0]["seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_url_answers_are_data_urls(openai_client: OpenAI) -> None:
    answer = openai_client.images.generate(model="dog-a", prompt=PROMPT, response_format="url")
    assert answer.data is not None
    url = answer.data[0].url
    assert url is not None
    assert url.startswith("data:image/png;base64,")
    assert image(url.partition(",")[2]).size == (32, 32)
    assert answer.data[0].b64_json is None


def test_openai_keys_at_their_defaults_are_taken(openai_client: OpenAI) -> None:
    assert openai_client.images.generate(
        model="dog-a",
        prompt=PROMPT,
        quality="auto",
        style="vivid",
        background="auto",
        moderation="auto",
        output_format="png",
        output_compression=100,
        user="someone",
        safety_identifier="someone",
        stream=False,
    ).data


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quality", "hd"),
        ("style", "natural"),
        ("background", "transparent"),
        ("moderation", "low"),
        ("output_compression", 50),
        ("partial_images", 2),
    ],
)
def test_openai_keys_without_effect_are_refused(client: TestClient, key: str, value: Any) -> None:
    response = post(client, **{key: value})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == key
    assert "no effect" in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"guidance": 3}, "guidance", "not a known parameter"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 11}, "n", "too large"),
        ({"n": "2"}, "n", "valid integer"),
        ({"n": True}, "n", "valid integer"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": 3}, "prompt", "valid string"),
        ({"prompt": "a\x00b"}, "prompt", "NUL"),
        ({"prompt": "a dog " * 80}, "prompt", "these tokens would be cut: dog a dog"),
        ({"negative_prompt": "a dog " * 80}, "negative_prompt", "would be cut"),
        ({"prompt": "a" * 601}, "prompt", "601 characters"),
        ({"size": "17x32"}, "size", "multiples of 4"),
        ({"size": "32"}, "size", "not understood"),
        ({"size": "0x0"}, "size", "not understood"),
        ({"size": "99996x99996"}, "size", "at most"),
        ({"size": "128x128"}, "size", "at most 4096 pixels"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal"),
        ({"num_inference_steps": 151}, "num_inference_steps", "too large"),
        ({"num_inference_steps": 10**30}, "num_inference_steps", "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps", "valid integer"),
        ({"guidance_scale": -1}, "guidance_scale", "greater than or equal"),
        ({"guidance_scale": 31}, "guidance_scale", "too large"),
        ({"guidance_scale": 1e300}, "guidance_scale", "too large"),
        ({"adapter_scale": 11}, "adapter_scale", "less than or equal"),
        ({"seed": -1}, "seed", "greater than or equal"),
        ({"seed": 2**63}, "seed", "less than or equal"),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "too large"),
        ({"solver": "heun"}, "solver", "ddim"),
        ({"response_format": "png"}, "response_format", "b64_json"),
        ({"model": None}, "model", "missing"),
    ],
)
def test_what_cannot_be_made_is_refused_with_its_name(
    client: TestClient, body: dict[str, Any], param: str, words: str
) -> None:
    response = post(client, **body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("key", ["guidance_scale", "adapter_scale", "num_inference_steps", "seed"])
def test_numbers_that_are_none(client: TestClient, key: str, number: str) -> None:
    body = f'{{"model": "dog-a", "prompt": "a dog", "{key}": {number}}}'
    response = client.post(ROUTE, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["param"] == key


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b"[" * 3000, b'{"n":' + b"9" * 3000]
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "multipart/form-data"])
def test_bodies_that_are_no_request(client: TestClient, body: bytes, kind: str) -> None:
    response = client.post(ROUTE, content=body, headers={"content-type": kind})
    assert response.status_code == 400
    error_of(response)


BODY = '{"model": "dog-a", "prompt": "a dog"}'
DEEP = 4000


WRONG_BODIES: tuple[tuple[str | bytes, str, str], ...] = (
    ('{"model": "dog-a", "model": "dog-b"}', "application/json", "says 'model' twice"),
    ('{"adapters": [{"scale": 1, "scale": 2}]}', "application/json", "says 'scale' twice"),
    ("[" * DEEP, "application/json", "nested too deeply"),
    (b'{"prompt": "\xff"}', "application/json", "not UTF-8"),
    (BODY, "text/plain", "set content-type: application/json"),
    (BODY, "application/x-www-form-urlencoded", "set content-type: application/json"),
    (BODY, "", "set content-type: application/json"),
    ('{"model": "m", "prompt": "a \\ud800 dog"}', "application/json", "unicode string"),
    ('{"\\ud800": 1}', "application/json", "unicode string"),
)


def test_what_is_wrong_with_a_body_is_named(client: TestClient) -> None:
    for body, kind, words in WRONG_BODIES:
        headers = {"content-type": kind} if kind else {}
        response = client.post(ROUTE, content=body, headers=headers)
        assert response.status_code == 400, body
        assert words in error_of(response)["message"]


def test_control_characters_are_refused(client: TestClient) -> None:
    for key in ("prompt", "negative_prompt"):
        for character in "\x00\x07\x1b\x7f\x85":
            response = post(client, **{key: f"a {character} dog"})
            assert response.status_code == 400
            assert error_of(response)["param"] == key


def test_negative_zero_is_zero(client: TestClient) -> None:
    zero, negative = (post(client, seed=1, guidance_scale=zero).json() for zero in (0.0, -0.0))
    assert negative["data"] == zero["data"]


def test_a_large_body_is_refused(client: TestClient) -> None:
    response = post(client, user="x" * 5000)
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


@pytest.mark.parametrize(
    "prompt", ["", "小さな犬", "🐕 in snow", "собака", "a\tdog\n", "\u202edog"]
)
def test_prompts_of_any_script(client: TestClient, prompt: str) -> None:
    assert post(client, prompt=prompt).status_code == (200 if prompt else 400)


def test_unknown_models_list_near_names(openai_client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        openai_client.images.generate(model="dgo-a", prompt=PROMPT)
    assert "did you mean dog-a" in str(error.value)
    assert error.value.param == "model"
    with pytest.raises(openai.NotFoundError, match="tiny"):
        openai_client.images.generate(model="tinny", prompt=PROMPT)
    with pytest.raises(openai.NotFoundError, match=r"no version '9'.*versions 1"):
        openai_client.images.generate(model="dog-a@9", prompt=PROMPT)
    for name in ("../dog-a", "dog-a/../dog-b", "DOG-A", ".", "dog-a@../1", "x" * 200):
        with pytest.raises(openai.NotFoundError):
            openai_client.images.generate(model=name, prompt=PROMPT)


def test_an_adapter_of_another_base_is_refused(
    client: TestClient, base: Base, store: Store
) -> None:
    publish(store, base, "stranger", 1, fingerprint="f" * 64)
    response = post(client, model="stranger")
    assert response.status_code == 400
    assert "another base" in error_of(response)["message"]
    assert "stranger" not in [card["id"] for card in client.get("/v1/models").json()["data"]]


def test_a_damaged_adapter_is_the_server_s_fault(client: TestClient, store: Store) -> None:
    weights_of(store, store.fetch("dog-b")).write_bytes(b"no weights")
    response = post(client, model="dog-b")
    assert response.status_code == 503
    assert error_of(response)["type"] == "server_error"
    assert post(client, model="dog-a").status_code == 200


def test_a_full_queue_is_429_with_retry_after(client: TestClient) -> None:
    response = post(client, n=9)
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert error_of(response)["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("POST", "/v1/images/edits", 404),
        ("GET", "/docs", 404),
        ("GET", ROUTE, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models?versions=perhaps", 400),
        ("GET", "/v1/models/nobody", 404),
    ],
)
def test_wrong_routes(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    error_of(response)


def test_models_are_listed(openai_client: OpenAI, client: TestClient, store: Store) -> None:
    models = {model.id: model for model in openai_client.models.list()}
    assert list(models) == ["tiny", *SUBJECTS]
    assert models["tiny"].owned_by == "base"
    assert models["dog-a"].created > 1_600_000_000
    listed = client.get("/v1/models", params={"versions": "true"}).json()["data"]
    assert "dog-a@1" in [card["id"] for card in listed]
    assert openai_client.models.retrieve("dog-a@1").id == "dog-a@1"
    (store.folder("dog-b") / RECORD).write_text("{")
    assert "dog-b" not in [model.id for model in openai_client.models.list()]


def test_the_base_is_served_by_its_name(openai_client: OpenAI) -> None:
    plain = openai_client.images.generate(model="tiny", prompt=PROMPT, extra_body={"seed": 1})
    tuned = openai_client.images.generate(model="dog-a", prompt=PROMPT, extra_body={"seed": 1})
    assert plain.data is not None
    assert tuned.data is not None
    assert plain.data[0].b64_json != tuned.data[0].b64_json


def test_published_while_serving(client: TestClient, base: Base, store: Store) -> None:
    assert post(client, model="newcomer").status_code == 404
    publish(store, base, "newcomer", 20)
    first = post(client, model="newcomer", seed=1).json()
    assert first["model"] == "newcomer@1"
    publish(store, base, "newcomer", 21)
    latest = post(client, model="newcomer", seed=1).json()
    assert latest["model"] == "newcomer@2"
    assert latest["data"] != first["data"]
    assert post(client, model="newcomer@1", seed=1).json()["data"] == first["data"]
    store.set_alias("newcomer", "best", 1)
    assert post(client, model="newcomer@best", seed=1).json()["data"] == first["data"]


def test_health_and_metrics(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    post(client, n=2)
    counted = client.get("/metrics.json").json()
    assert counted["images_finished"] == 2
    assert counted["denoise_steps"] == 3
    assert counted["occupancy"] == 1.0


def test_the_openapi_document_names_the_routes(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert {ROUTE, "/v1/models", "/healthz"} <= set(document["paths"])
    assert "HTTPValidationError" not in json.dumps(document["paths"][ROUTE])
