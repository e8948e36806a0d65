"""`raybooth serve` in its own process: ready, answering, stopped by Ctrl-C; and its refusals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from raybooth.cli import main
from raybooth.errors import InputError, ServingError
from raybooth.model.base import Base
from raybooth.store import Store
from raybooth_serving.access.keys import Keyring
from raybooth_serving.client import Client
from raybooth_serving.commands.serve import free_port
from tests.raybooth_serving.published import publish


def test_a_free_port_is_found_and_a_used_one_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        used = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen at 127.0.0.1:{used}"):
            free_port("127.0.0.1", used)
    assert free_port("127.0.0.1", 0) > 0
    assert free_port("127.0.0.1", used) == used


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "70000"], "port"),
        (["--config", "no-such-config"], "no serve config is called"),
        (["--base", "/no/such/folder"], "no base is called"),
        (["--config", "sd15-sdxl-h100", "--base", "pocket"], "--base names one base"),
        (["--host", "no.such.host.invalid"], "cannot listen at"),
        (["--host", "0.0.0.0", "--port", "0"], "raybooth keys create"),
    ],
)
def test_what_cannot_be_served_is_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_used_port_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert main(["serve", "--port", str(listener.getsockname()[1])]) == 2
    assert "choose another with --port" in capsys.readouterr().err


@pytest.mark.ray
def test_serve_until_ctrl_c(
    base: Base, tiny_folder: Path, store: Store, raybooth_home: Path, tmp_path: Path
) -> None:
    config = tmp_path / "tiny.yaml"
    engine, defaults = "{num_slots: 2, max_rank: 4}", "{num_inference_steps: 2}"
    config.write_text(
        f"auth: {{required: always}}\nbases: [{{engine: {engine}, defaults: {defaults}}}]\n"
    )
    ring = Keyring(raybooth_home / "keys.json")
    _, secret = ring.create("studio", subjects=["*"])
    words = ["--config", str(config), "--port", "0", "--base", tiny_folder.name]
    roots = [str(Path(__file__).parents[2] / name) for name in ("platform", "serving")]
    process = subprocess.Popen(
        [sys.executable, "-m", "raybooth.cli", "serve", *words],
        cwd=tiny_folder.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        ready = next((line for line in process.stdout if line.startswith("RayBooth serves")), "")
        assert "4 subjects at http://127.0.0.1:" in ready, process.communicate()[1][-3000:]
        client = Client(ready.split()[-1], api_key=secret)
        assert client.generate("dog-a", "a photo of sks dog", n=2)
        publish(store, base, "newcomer", 8)
        assert client.generate("newcomer", "a dog")
        ring.revoke("studio")
        with pytest.raises(ServingError, match="401: found this API key is not known"):
            client.models()
        os.killpg(process.pid, signal.SIGINT)  # the whole group, as a terminal does
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert "raybooth: stopped" in errors
    finally:
        process.kill()


@pytest.mark.ray
def test_an_unreachable_ray_is_a_clear_error(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port('127.0.0.1', 0)}")
    words = ["serve", "--base", str(tiny_folder), "--port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "raybooth.cli", *words], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Ray cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
