"""A full fleet through Ray Train: two workers under ZeRO, one killed, published and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.raybooth.fleet.fleets import survey_of, write_fleet
from tests.raybooth.fleet.test_dispatcher import Watcher

from raybooth import cli
from raybooth.fleet.events import Event, PackEvent, StateEvent, StepEvent
from raybooth.fleet.queue import Queue
from raybooth.fleet.rounds import train_fleet
from raybooth.fleet.task import Folders
from raybooth.store import FullRecord, Store

pytestmark = pytest.mark.ray

TRAIN: dict[str, Any] = {
    "method": "full",
    "num_train_steps": 40,
    "batch_size": 2,
    "adapter": {"rank": 4, "targets": "attention"},  # the defaults: a full run has none
    "full": {"text_encoder": True, "zero_stage": 2, "num_workers": 2},
    "checkpoint": {"every_steps": 2},
    "resources": {"num_cpus": 1, "num_gpus": 0},
}


def test_two_workers_train_one_dies_and_the_subject_is_published_and_drawn(
    ray_session: Any,
    tmp_path: Path,
    tiny_base: Path,
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def act(watcher: Watcher, event: Event) -> None:
        if isinstance(event, StepEvent) and 4 <= event.train_step < 40:
            watcher.kill("rex")

    folders.store.parent.mkdir(parents=True)
    fleet = write_fleet(tmp_path, tiny_base, {"rex": {}}, TRAIN)
    view = Watcher(act)
    queue = Queue(folders.store.parent / "fleet.db")
    report = train_fleet(survey_of(fleet, folders), queue, folders, view)
    assert (report.published, report.failed) == (("rex@1",), {})
    assert view.killed == ["rex"]
    started = [e for e in view.events if isinstance(e, PackEvent) and e.state == "started"]
    assert len(started) == 2
    resumed = [e.train_step for e in view.events if isinstance(e, StateEvent)]
    assert max(step for step in resumed[:-1] if step is not None) >= 2
    record = Store(folders.store).fetch("rex")
    assert isinstance(record, FullRecord)
    assert record.parts == ("unet", "text_encoder")
    assert len(record.loss_curve) == 40
    monkeypatch.setenv("RAYBOOTH_HOME", str(folders.store.parent))
    out = tmp_path / "rex.png"
    command = ["generate", "rex", "a photo of sks dog", "--steps", "2", "-o", str(out)]
    assert cli.main(command) == 0
    assert out.is_file()
