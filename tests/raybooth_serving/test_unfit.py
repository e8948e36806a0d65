"""Prompts and pictures that an endpoint does not make, through its routes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from PIL import Image
from starlette.testclient import TestClient

from raybooth.config import EngineConfig, SafetyConfig, SamplingDefaults, ServeConfig, ServedBase
from raybooth.errors import ConfigError
from raybooth.model.base import Base
from raybooth.store import Store
from raybooth_serving.access.keys import Keyring
from raybooth_serving.service import Service
from raybooth_serving.wire.routes import make_app
from tests.raybooth_serving.checker import write_tiny_checker

ROUTE = "/v1/images/generations"
SERVED = ServedBase(
    engine=EngineConfig(num_slots=2, max_rank=4, row_buckets=(1, 2)),
    defaults=SamplingDefaults(num_inference_steps=3, guidance_scale=1),
)
POLICIES = "tests.raybooth_serving.policies"


@contextmanager
def _serving(
    base: Base, store: Store, keyring: Keyring | None = None, **safety: str
) -> Iterator[TestClient]:
    config = ServeConfig(bases=(SERVED,), safety=SafetyConfig.model_validate(safety))
    service = Service(base, store, config, SERVED)
    app = make_app(service, config.limits, keyring)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client
        assert client.portal is not None
        client.portal.call(service.engine.close)


def _draw(client: TestClient, secret: str = "any", **changed: Any) -> Any:
    body = {"model": "dog-a", "prompt": "a dog", "seed": 3, **changed}
    return client.post(ROUTE, json=body, headers={"Authorization": f"Bearer {secret}"})


def _events(answer: Any) -> list[dict[str, Any]]:
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def _picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def _is_black(text: str) -> bool:
    return _picture(text).getextrema() == ((0, 0),) * 3


@pytest.fixture(scope="module")
def prude(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checker that flags every picture."""
    return str(write_tiny_checker(tmp_path_factory.mktemp("checkers") / "prude"))


# ------------------------------------------------------------------ prompts


def test_the_policy_is_asked_before_anything_is_queued(base: Base, store: Store) -> None:
    keyring = Keyring(store.root.parent / "keys.json")
    _, secret = keyring.create("studio", subjects=["*"])
    with _serving(base, store, keyring, policy=f"{POLICIES}:no_cats") as client:
        for more in ({}, {"stream": True}):
            refused = _draw(client, secret, prompt="a cat", **more)
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert error["code"] == "content_policy_violation"
            assert error["type"] == "invalid_request_error"
            assert "no cats for studio with dog-a" in error["message"]
        both = [{"subject": "dog-b"}, {"subject": "robot-c@1"}]
        for more, told in ({}, "the base"), ({"adapters": both}, "dog-b robot-c"):
            answer = _draw(client, secret, prompt="a cat", model="tiny", **more)
            assert f"with {told};" in answer.json()["error"]["message"]
        headers = {"Authorization": f"Bearer {secret}"}
        counted = client.get("/metrics.json", headers=headers).json()
        assert counted["denoise_steps"] == counted["images_joined"] == 0
        assert _draw(client, secret).status_code == 200


def test_refused_prompts_are_free_and_unfit_images_are_not(
    base: Base, store: Store, prude: str
) -> None:
    keyring = Keyring(store.root.parent / "keys.json")
    _, secret = keyring.create("studio", subjects=["*"], images_per_minute=1)
    with _serving(base, store, keyring, policy=f"{POLICIES}:no_cats", checker=prude) as client:
        prompts = ("a cat", "a cat", "a dog", "a dog")
        statuses = [_draw(client, secret, prompt=prompt).status_code for prompt in prompts]
    assert statuses == [400, 400, 400, 429]


def test_a_broken_policy_refuses_everything(
    base: Base, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with _serving(base, store, policy=f"{POLICIES}:broken") as client:
        answer = _draw(client)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "content_policy_violation"
    assert "where the policy is kept" not in answer.text
    assert "where the policy is kept" in caplog.text


def test_a_policy_or_checker_that_is_not_there_is_refused_at_start(
    base: Base, store: Store, tmp_path: Path
) -> None:
    for safety in ({"policy": f"{POLICIES}:none"}, {"checker": str(tmp_path)}):
        with pytest.raises(ConfigError, match="safety"), _serving(base, store, **safety):
            pass


# ------------------------------------------------------------------ pictures


def test_a_flagged_image_is_refused(base: Base, store: Store, prude: str) -> None:
    with _serving(base, store, checker=prude) as client:
        http: Any = client
        url = "http://localhost/v1"
        caller = OpenAI(base_url=url, api_key="any", http_client=http, max_retries=0)
        with pytest.raises(openai.BadRequestError, match="safety checker") as error:
            caller.images.generate(model="dog-a", prompt="a dog")
        assert error.value.code == "content_policy_violation"
        events = _events(_draw(client, stream=True, partial_images=2))
        assert events[-1]["error"]["code"] == "content_policy_violation"
        assert all(_is_black(event["b64_json"]) for event in events[:-1]), "partial ones too"


def test_a_flagged_image_can_be_black_and_say_so(base: Base, store: Store, prude: str) -> None:
    with _serving(base, store, checker=prude, on_flag="blank") as client:
        images = _draw(client, n=2, size="32x16").json()["data"]
        assert [image["flagged"] for image in images] == [True, True]
        assert [_picture(image["b64_json"]).size for image in images] == [(32, 16)] * 2
        (done,) = _events(_draw(client, stream=True))
        assert done["flagged"] is True
    assert all(_is_black(image["b64_json"]) for image in [*images, done])


def test_what_is_not_flagged_is_as_without_a_checker(
    base: Base, store: Store, tmp_path: Path
) -> None:
    checker = write_tiny_checker(tmp_path / "blind", flagged=Image.new("RGB", (8, 8)), above=2.0)
    drawn = []
    for safety in ({}, {"checker": str(checker)}):
        with _serving(base, store, **safety) as client:
            (image,) = _draw(client).json()["data"]
            assert "flagged" not in image
            drawn.append(image["b64_json"])
    assert drawn[0] == drawn[1]
