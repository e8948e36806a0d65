"""`raybooth train` without Ray: what is published is skipped, what is wrong is told first."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from tests.raybooth.fleet.fleets import Mailbox, pack_task, survey_of, write_fleet
from tests.tiny import write_tiny_base

from raybooth.cli import main
from raybooth.fleet.queue import Queue
from raybooth.fleet.task import Folders
from raybooth.fleet.worker import train_pack_fn


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("train") / "base")


@pytest.fixture(autouse=True)
def ray_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets for Ray ends with the test."""
    from raybooth.fleet.machine import LOCAL_SETTINGS, SETTINGS

    for name in (*SETTINGS, *LOCAL_SETTINGS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


def publish_all(path: Path) -> None:
    folders = Folders.of_home()
    task = pack_task(survey_of(path, folders), folders)
    train_pack_fn({"task": task, "monitor": Mailbox()})


def test_a_published_fleet_is_skipped(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_fleet(tmp_path, base, {"rex": {}, "tom": {}})
    publish_all(path)
    assert main(["train", str(path)]) == 0
    assert "2 published: rex@1, tom@1" in capsys.readouterr().out


def test_events_are_one_json_object_a_line(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_fleet(tmp_path, base, {"rex": {}})
    publish_all(path)
    assert main(["train", str(path), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["job", "job", "end"]
    assert events[-1]["published"] == ["rex@1"]


def test_input_errors_come_before_anything_else(
    tmp_path: Path, base: Path, raybooth_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_fleet(tmp_path, base, {"rex": {}})
    (tmp_path / "photos" / "rex" / "1.png").write_text("not a picture")
    assert main(["train", str(path)]) == 2
    assert "1.png" in capsys.readouterr().err
    assert not (raybooth_home / "fleet.db").exists()
    assert main(["train", str(tmp_path / "missing.yaml")]) == 2


def test_a_cluster_that_cannot_be_reached_leaves_the_jobs_queued(
    tmp_path: Path,
    base: Path,
    raybooth_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{probe.getsockname()[1]}")
    path = write_fleet(tmp_path, base, {"rex": {}})
    assert main(["train", str(path)]) == 1
    captured = capsys.readouterr()
    assert "cannot be reached" in captured.err
    assert "Traceback" not in captured.err
    (job,) = Queue(raybooth_home / "fleet.db").jobs()
    assert (job.state, job.lease_owner) == ("queued", None)
