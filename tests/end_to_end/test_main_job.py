"""From photos to served pictures through the commands alone, as a platform team uses them."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from raybooth.pocket import path as pocket_path
from raybooth.pocket import world

pytestmark = pytest.mark.ray

TRAIN = {
    "resolution": 64,
    "num_train_steps": 6,
    "batch_size": 1,
    "adapter": {"rank": 4, "targets": "all"},
    "optimizer": {"learning_rate": 5e-3},
    "prior": {"num_images": 2, "num_inference_steps": 4, "guidance_scale": 3.0},
    "samples": {"prompts": ["a photo of {identifier} {class_noun}"], "num_inference_steps": 4},
    "checkpoint": {"every_steps": 3},
}
SAMPLING = {"num_inference_steps": 5, "guidance_scale": 3.0, "seed": 4, "solver": "ddim"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main-job")


def raybooth(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAYBOOTH_HOME": str(home / "state")}
    command = [sys.executable, "-m", "raybooth.cli", *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


@pytest.fixture(scope="module")
def trained(home: Path) -> list[dict[str, Any]]:
    """Two robots and a fish, trained and published by one command."""
    subjects = []
    for seed, (subject_id, class_noun) in enumerate(
        [("bolt", "robot"), ("gizmo", "robot"), ("finn", "fish")]
    ):
        folder = home / "photos" / subject_id
        folder.mkdir(parents=True)
        instance = world.draw_instance(seed, class_noun, fancy=True)
        for index, photo in enumerate(world.subject_photos(instance, 3, seed)):
            photo.save(folder / f"{index}.png")
        subjects.append(
            {"id": subject_id, "class_noun": class_noun, "images": f"photos/{subject_id}"}
        )
    fleet = home / "fleet.yaml"
    fleet.write_text(json.dumps({"base": "pocket", "train": TRAIN, "subjects": subjects}))
    done = raybooth(home, "train", str(fleet), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events
    models: list[dict[str, Any]] = json.loads(raybooth(home, "models", "--json").stdout)
    return models


@contextmanager
def endpoint(home: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "RAYBOOTH_HOME": str(home / "state")}
    command = [sys.executable, "-m", "raybooth.cli", "serve", "--port", str(port)]
    with (home / "serve.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 180
            while True:
                assert process.poll() is None, (home / "serve.log").read_text()[-3000:]
                assert time.monotonic() < deadline, (home / "serve.log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5)
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(timeout=60) == 130
            finally:
                process.kill()


def test_every_subject_is_published_whole(home: Path, trained: list[dict[str, Any]]) -> None:
    assert [model["id"] for model in trained] == ["bolt@1", "finn@1", "gizmo@1"]
    for model in trained:
        files = {path.name for path in Path(model["folder"]).iterdir()}
        assert files == {"pytorch_lora_weights.safetensors", "record.json", "samples.png"}
        record = json.loads((Path(model["folder"]) / "record.json").read_text())
        assert record["num_train_steps"] == TRAIN["num_train_steps"]
        assert len(record["loss_curve"]) == TRAIN["num_train_steps"]
        assert record["prior"]["num_images"] == 2
        assert len(record["photos"]) == 3
    verified = raybooth(home, "models", "verify")
    assert verified.returncode == 0
    assert verified.stdout.count("whole") == 3


def test_two_subjects_of_a_class_share_one_prior(home: Path, trained: list[dict[str, Any]]) -> None:
    priors = json.loads(raybooth(home, "prior", "ls", "--json").stdout)
    assert len(priors) == 2
    keys = {
        json.loads((Path(model["folder"]) / "record.json").read_text())["prior"]["key"]
        for model in trained
        if model["class_noun"] == "robot"
    }
    assert len(keys) == 1


def test_the_same_command_again_skips_what_is_published(
    home: Path, trained: list[dict[str, Any]]
) -> None:
    again = raybooth(home, "train", str(home / "fleet.yaml"), "--json")
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads(raybooth(home, "models", "--json").stdout) == trained


def test_plain_diffusers_draws_the_same_picture(home: Path, trained: list[dict[str, Any]]) -> None:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    prompt = "a photo of sks robot on the beach"
    out = home / "ours.png"
    words = ["generate", "bolt", prompt, "--seed", "4", "--steps", "5", "--guidance", "3"]
    done = raybooth(home, *words, "--solver", "ddim", "-o", str(out))
    assert done.returncode == 0, done.stderr
    pipe = StableDiffusionPipeline.from_pretrained(
        pocket_path(), torch_dtype=torch.float32, safety_checker=None
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.load_lora_weights(trained[0]["folder"])
    theirs = pipe(
        prompt,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(4),
    ).images[0]
    difference = np.asarray(Image.open(out), int) - np.asarray(theirs, int)
    assert np.abs(difference).max() <= 1
    pipe.unload_lora_weights()
    plain = pipe(
        prompt,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(4),
    ).images[0]
    assert np.abs(np.asarray(plain, int) - np.asarray(theirs, int)).max() > 1


def test_the_openai_client_gets_mixed_subjects(home: Path, trained: list[dict[str, Any]]) -> None:
    prompt = "a photo of sks robot on the beach"
    with endpoint(home) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert {"bolt", "finn", "gizmo", "pocket"} <= {model.id for model in client.models.list()}
        answer = client.images.generate(model="bolt", prompt=prompt, n=2, extra_body=SAMPLING)
        assert answer.data is not None
        assert len(answer.data) == 2
        assert answer.data[0].b64_json is not None
        served = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
        with pytest.raises(openai.NotFoundError, match="bolt"):
            client.images.generate(model="bolts", prompt=prompt)
    out = home / "local.png"
    words = ["generate", "bolt", prompt, "--seed", "4", "--steps", "5", "--guidance", "3"]
    assert raybooth(home, *words, "--solver", "ddim", "-o", str(out)).returncode == 0
    local = np.asarray(Image.open(out).convert("RGB"), int)
    assert np.abs(np.asarray(served.convert("RGB"), int) - local).max() <= 1


def test_input_errors_exit_with_2_and_no_traceback(home: Path) -> None:
    for words in (
        ["check", "nowhere.yaml"],
        ["train", "nowhere.yaml"],
        ["models", "show", "nobody"],
    ):
        done = raybooth(home, *words)
        assert done.returncode == 2, words
        assert done.stderr.startswith("raybooth: ")
        assert "Traceback" not in done.stderr
