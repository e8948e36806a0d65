"""The endpoint on a real Ray Serve, spoken to by the real `openai` client over the loopback."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
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

from raybooth.config import (
    EngineConfig,
    LimitsConfig,
    SamplingDefaults,
    ServeConfig,
    ServedBase,
    ServedFull,
)
from raybooth.errors import InputProblems, ServingError
from raybooth.model.base import Base, load_base
from raybooth.store import Store
from raybooth_serving.client import Client
from raybooth_serving.commands.serve import free_port
from tests.raybooth_serving.conftest import SUBJECTS
from tests.raybooth_serving.published import publish, publish_full
from tests.tiny import write_tiny_base

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
    two_folder = write_tiny_base(tmp_path_factory.mktemp("bases") / "Two", seed=2)
    publish(store, load_base(str(two_folder)), "fox", 7)
    publish(store, base, "alien", 8, fingerprint="f" * 64)
    publish_full(store, tiny_folder, "rex", 9)
    one = ServedBase(
        base=str(tiny_folder),
        engine=EngineConfig(num_slots=2, max_rank=4, row_buckets=(4,), max_queued_images=24),
        defaults=SamplingDefaults(num_inference_steps=4),
    )
    config = ServeConfig(
        port=free_port("127.0.0.1", 0),
        bases=(one, one.model_copy(update={"base": str(two_folder), "replicas": 2})),
        full=ServedFull(),
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


def test_each_model_is_answered_by_its_own_base(endpoint: Endpoint) -> None:
    names = [card.id for card in endpoint.client.models.list()]
    assert names[:2] == ["tiny", "Two"]
    assert {"dog-a", "fox", "rex"} <= set(names)
    assert "alien" not in names
    models = ("tiny", "Two", "dog-a", "fox", "rex")
    assert len({pixels(endpoint.client, model) for model in models}) == len(models)
    with pytest.raises(
        openai.BadRequestError, match=r"alien@1 was trained on another base"
    ) as error:
        pixels(endpoint.client, "alien")
    assert error.value.param == "model"


def test_metrics_are_those_of_all_replicas(endpoint: Endpoint) -> None:
    before = Client(endpoint.url).metrics()
    assert before["replicas"] == 4
    for model in ("dog-a", "fox", "Two", "Two"):
        pixels(endpoint.client, model)
    after = Client(endpoint.url).metrics()
    assert after["images_finished"] - before["images_finished"] == 4
    assert after["denoise_steps"] - before["denoise_steps"] == 16
    assert after["images_denoised"] - before["images_denoised"] == pytest.approx(4)
    assert after["first_steps"] == after["images_joined"]


def test_a_killed_replica_costs_no_image(endpoint: Endpoint) -> None:
    """The request that it worked on is made again by the other, with the same bytes."""
    alone = pixels(endpoint.client, "fox", num_inference_steps=40)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(pixels, endpoint.client, "fox", num_inference_steps=300)
        busy = busiest_replica("engine-two")
        asked_too = pixels(endpoint.client, "fox", num_inference_steps=40)
        os.kill(busy, signal.SIGKILL)
        assert Image.frombytes("RGB", (32, 32), asked.result(timeout=120))
    assert asked_too == alone == pixels(endpoint.client, "fox", num_inference_steps=40)


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


def test_a_deleted_subject_leaves_every_memory(endpoint: Endpoint, base: Base) -> None:
    publish(endpoint.store, base, "passing", 32)
    assert pixels(endpoint.client, "passing")
    held = Client(endpoint.url).metrics()["host_adapters"]
    endpoint.store.delete("passing")
    with pytest.raises(openai.NotFoundError):
        pixels(endpoint.client, "passing")
    deadline = time.monotonic() + 30
    while Client(endpoint.url).metrics()["host_adapters"] >= held:
        assert time.monotonic() < deadline, "a replica still holds a deleted subject"
        time.sleep(0.1)


def test_several_subjects_in_one_image(endpoint: Endpoint) -> None:
    both = [{"subject": "dog-a", "scale": 0.5}, {"subject": "dog-b@latest", "scale": 0.5}]
    first = pixels(endpoint.client, "tiny", adapters=both)
    assert pixels(endpoint.client, "dog-a", adapters=both) == first
    assert first not in [pixels(endpoint.client, model) for model in ("tiny", "dog-a", "dog-b")]


def test_subjects_in_memory_go_on_while_the_store_is_away(endpoint: Endpoint) -> None:
    before = pixels(endpoint.client, "dog-b")
    aside = endpoint.store.root.with_name("aside")
    endpoint.store.root.rename(aside)
    try:
        assert pixels(endpoint.client, "dog-b") == before
        with pytest.raises(openai.InternalServerError, match="the store is away") as error:
            pixels(endpoint.client, "never-seen")
        assert (error.value.status_code, error.value.code) == (503, "store_away")
        assert Client(endpoint.url).metrics()["store_away_requests"] == 2
    finally:
        aside.rename(endpoint.store.root)
    with pytest.raises(openai.NotFoundError):
        pixels(endpoint.client, "never-seen")


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
    body = {"model": "dog-a", "prompt": PROMPT, "n": 10, "num_inference_steps": 400}
    headers = {"content-type": "application/json"}
    url = f"{endpoint.url}/v1/images/generations"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(request, timeout=1.0)
    deadline = time.monotonic() + 60
    while Client(endpoint.url).metrics()["images_cancelled"] == before:
        assert time.monotonic() < deadline, "the rows of a client that left are still denoised"
        time.sleep(0.1)
    assert pixels(endpoint.client, "dog-b")


def test_a_stream_whose_reader_leaves_frees_its_rows(endpoint: Endpoint) -> None:
    def events(steps: int) -> Any:
        return endpoint.client.images.generate(
            model="dog-a",
            prompt=PROMPT,
            n=2,
            stream=True,
            partial_images=1,
            extra_body={"num_inference_steps": steps},
        )

    whole = sorted(event.type.rpartition(".")[2] for event in events(4))
    assert whole == ["completed"] * 2 + ["partial_image"] * 2
    before = Client(endpoint.url).metrics()
    with events(400) as left:
        assert next(left).type == "image_generation.partial_image"
    deadline = time.monotonic() + 30
    while Client(endpoint.url).metrics()["images_cancelled"] < before["images_cancelled"] + 2:
        assert time.monotonic() < deadline, "the rows of a reader that left are still denoised"
    assert Client(endpoint.url).metrics()["images_finished"] == before["images_finished"]


def test_a_request_with_a_key_goes_on_without_its_client(endpoint: Endpoint) -> None:
    before = Client(endpoint.url).metrics()
    body = {"model": "dog-b", "prompt": PROMPT, "num_inference_steps": 300}
    headers = {"content-type": "application/json", "idempotency-key": "one"}
    url = f"{endpoint.url}/v1/images/generations"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(request, timeout=0.5)
    with urllib.request.urlopen(request) as response:
        assert response.headers["idempotent-replayed"] == "true"
        assert len(json.load(response)["data"]) == 1
    after = Client(endpoint.url).metrics()
    assert after["images_accepted"] == before["images_accepted"] + 1
    assert after["images_cancelled"] == before["images_cancelled"]


def test_a_serve_config_may_name_one_of_ours(endpoint: Endpoint, tmp_path: Path) -> None:
    from raybooth_serving.app import build

    assert build({"config": "pocket-cpu", "home": str(tmp_path), "limits": {"max_images": 2}})
    with pytest.raises(InputProblems, match="limit is not a known key"):
        build({"config": "pocket-cpu", "home": str(tmp_path), "limit": {"max_images": 2}})


def test_the_small_client(endpoint: Endpoint) -> None:
    client = Client(endpoint.url)
    assert client.models()[:3] == ["tiny", "Two", "dog-a"]
    assert Image.open(io.BytesIO(client.generate("dog-a", PROMPT, n=2)[1])).size == (32, 32)
    with pytest.raises(ServingError, match=r"404.*dgo-a"):
        client.generate("dgo-a", PROMPT)
    with pytest.raises(ServingError, match="does not answer"):
        Client(f"http://127.0.0.1:{free_port('127.0.0.1', 0)}").models()


def test_what_runs_when_the_endpoint_goes_is_finished(endpoint: Endpoint) -> None:
    from ray import serve

    from raybooth_serving.app import APPLICATION

    with ThreadPoolExecutor(6) as threads:
        asked = [
            threads.submit(pixels, endpoint.client, model, num_inference_steps=200)
            for model in ("dog-a", "dog-b", "robot-c", "tiny", "fox", "Two")
        ]
        deadline = time.monotonic() + 60
        while Client(endpoint.url).metrics()["images_running"] < 4:
            assert time.monotonic() < deadline
        serve.delete(APPLICATION)
        assert len({picture.result() for picture in asked}) == 6
    with pytest.raises(openai.NotFoundError):
        pixels(endpoint.client, "dog-a")


def busiest_replica(deployment: str) -> int:
    """The process of the replica of our own Ray that has used most time by now."""
    from ray._private.state import actors

    pids = [
        actor["Pid"]
        for actor in actors().values()
        if actor["State"] == "ALIVE" and deployment in actor["Name"]
    ]
    assert len(pids) == 2
    before = [process_time(pid) for pid in pids]
    time.sleep(1)
    spent = [process_time(pid) - start for pid, start in zip(pids, before, strict=True)]
    return pids[spent.index(max(spent))]


def process_time(pid: int) -> int:
    """Ticks of user time."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])
