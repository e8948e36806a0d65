"""The endpoint on a real Ray Serve, spoken to by the real `openai` client over the loopback."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from PIL import Image

from raybooth.config import EngineConfig, LimitsConfig, SamplingDefaults, ServeConfig, ServedBase
from raybooth.errors import InputProblems, ServingError
from raybooth.model.base import Base
from raybooth.store import Store
from raybooth_serving.client import Client
from raybooth_serving.commands import free_port
from tests.raybooth_serving.conftest import SUBJECTS
from tests.raybooth_serving.published import publish

pytestmark = pytest.mark.ray

PROMPT = "a photo of sks dog"


@dataclass(frozen=True)
class Endpoint:
    url: str
    store: Store
    client: OpenAI


@pytest.fixture(scope="module")
def endpoint(
    ray_session: Any, tmp_path_factory: pytest.TempPathFactory, base: Base, tiny_folder: Path
) -> Iterator[Endpoint]:
    from ray import serve

    from raybooth_serving.app import deployed

    root = tmp_path_factory.mktemp("home")
    store = Store(root / "models")
    for seed, subject_id in enumerate(SUBJECTS):
        publish(store, base, subject_id, seed)
    served = ServedBase(
        base=str(tiny_folder),
        engine=EngineConfig(num_slots=2, max_rank=4, row_buckets=(4,), max_queued_images=24),
        defaults=SamplingDefaults(num_inference_steps=4),
    )
    config = ServeConfig(
        port=free_port("127.0.0.1", 0),
        bases=(served,),
        limits=LimitsConfig(max_body_bytes=65536, max_inference_steps=400),
    )
    with deployed(config, root) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        yield Endpoint(url, store, client)
    serve.shutdown()


def pixels(client: OpenAI, model: str, **extra: Any) -> bytes:
    answer = client.images.generate(model=model, prompt=PROMPT, extra_body={"seed": 3, **extra})
    assert answer.data is not None
    assert answer.data[0].b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).tobytes()


def test_mixed_subjects_at_once_are_each_as_alone(endpoint: Endpoint) -> None:
    models = ["tiny", *SUBJECTS]
    alone = [pixels(endpoint.client, model) for model in models]
    assert len(set(alone)) == len(models)
    with ThreadPoolExecutor(len(models)) as threads:
        together = list(threads.map(lambda model: pixels(endpoint.client, model), models))
    assert together == alone
    assert Client(endpoint.url).metrics()["slot_evictions"] > 0


def test_answers_carry_a_request_id_and_the_size(endpoint: Endpoint) -> None:
    answer = endpoint.client.images.generate(model="dog-a", prompt=PROMPT, n=3)
    assert answer._request_id
    assert answer.size == "32x32"
    assert answer.data is not None
    assert len(answer.data) == 3


def test_published_while_serving(endpoint: Endpoint, base: Base) -> None:
    with pytest.raises(openai.NotFoundError, match="newcomer"):
        pixels(endpoint.client, "newcomer")
    publish(endpoint.store, base, "newcomer", 30)
    first = pixels(endpoint.client, "newcomer")
    publish(endpoint.store, base, "newcomer", 31)
    assert pixels(endpoint.client, "newcomer") != first
    assert pixels(endpoint.client, "newcomer@1") == first
    assert "newcomer" in [model.id for model in endpoint.client.models.list()]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/", None, 404),
        ("GET", "/v1/images/generations", None, 405),
        ("POST", "/v1/images/generations", {"model": "dog-a"}, 400),
        ("POST", "/v1/images/generations", {"model": "dog-a", "prompt": "a", "n": "x"}, 400),
        ("POST", "/v1/images/generations", {"model": "dgo-a", "prompt": "a dog"}, 404),
        ("POST", "/v1/images/generations", {"model": "dog-a", "prompt": "x" * 70000}, 413),
    ],
)
def test_errors_are_in_openai_form(
    endpoint: Endpoint, method: str, path: str, body: dict[str, Any] | None, status: int
) -> None:
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(endpoint.url + path, data, headers, method=method)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == status
    assert error.value.headers["x-request-id"]
    answer = json.loads(error.value.read())
    assert list(answer) == ["error"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_too_long_a_prompt_names_the_tokens_cut(endpoint: Endpoint) -> None:
    with pytest.raises(openai.BadRequestError, match="would be cut: dog a dog") as error:
        endpoint.client.images.generate(model="dog-a", prompt="a dog " * 40)
    assert error.value.param == "prompt"
    assert error.value.code == "invalid_request"


def test_a_full_queue_is_a_rate_limit_error(endpoint: Endpoint) -> None:
    def call(_: int) -> openai.RateLimitError | None:
        try:
            pixels(endpoint.client, "dog-a", num_inference_steps=30, n=5)
        except openai.RateLimitError as error:
            return error
        return None

    with ThreadPoolExecutor(10) as threads:
        refused = [error for error in threads.map(call, range(10)) if error is not None]
    assert 1 <= len(refused) <= 6
    assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)


def test_a_client_that_leaves_frees_its_rows(endpoint: Endpoint) -> None:
    before = Client(endpoint.url).metrics()["images_cancelled"]
    impatient = endpoint.client.with_options(timeout=1.0)
    with pytest.raises(openai.APITimeoutError):
        impatient.images.generate(
            model="dog-a", prompt=PROMPT, n=10, extra_body={"num_inference_steps": 400}
        )
    deadline = time.monotonic() + 60
    while Client(endpoint.url).metrics()["images_cancelled"] == before:
        assert time.monotonic() < deadline, "the rows of a client that left are still denoised"
        time.sleep(0.1)
    assert pixels(endpoint.client, "dog-b")


def test_a_serve_config_may_name_one_of_ours(endpoint: Endpoint, tmp_path: Path) -> None:
    from raybooth_serving.app import build

    assert build({"config": "pocket-cpu", "home": str(tmp_path), "limits": {"max_images": 2}})
    with pytest.raises(InputProblems, match="limit is not a known key"):
        build({"config": "pocket-cpu", "home": str(tmp_path), "limit": {"max_images": 2}})


def test_the_small_client(endpoint: Endpoint) -> None:
    client = Client(endpoint.url)
    assert client.models()[:2] == ["tiny", "dog-a"]
    assert Image.open(io.BytesIO(client.generate("dog-a", PROMPT, n=2)[1])).size == (32, 32)
    with pytest.raises(ServingError, match=r"404.*dgo-a"):
        client.generate("dgo-a", PROMPT)
    with pytest.raises(ServingError, match="does not answer"):
        Client(f"http://127.0.0.1:{free_port('127.0.0.1', 0)}").models()
