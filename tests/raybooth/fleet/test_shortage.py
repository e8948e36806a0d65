"""A pack that finds too little memory is split once; who still finds too little is told why."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.raybooth.fleet.fleets import pack_task, survey_of, write_fleet
from tests.raybooth.training.jobs import make_job

from raybooth.errors import TrainingError
from raybooth.fleet.shortage import free_bytes, is_out_of_memory, predicted_bytes, shortage
from raybooth.fleet.task import Folders
from raybooth.model.base import load_base

ROOT = Path(__file__).parents[3]
SUBJECTS = ("rex", "tom", "ada", "bob")
LARGE = {"resolution": 64, "batch_size": 16, "num_train_steps": 2, "samples": {"prompts": []}}
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""What is freed goes back to the kernel, which does the counting here."""

SHORT = """
import json, pickle, resource, sys
from tests.raybooth.fleet.fleets import Mailbox
from raybooth.fleet import reporter
from raybooth.fleet.events import NoteEvent, StateEvent
from raybooth.fleet.worker import train_pack_fn

reporter.FLUSH_S = 0.0
room = int(sys.argv[2])

def vm_size():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))

class Limits(Mailbox):
    limited = False

    def __getattr__(self, name):
        running = [e for e in self.monitor._events if getattr(e, "state", "") == "running"]
        if name == "push" and running and not self.limited:
            self.limited = True
            resource.setrlimit(resource.RLIMIT_AS, (vm_size() + room,) * 2)
        return super().__getattr__(name)

mailbox = Limits()
with open(sys.argv[1], "rb") as file:
    done = train_pack_fn({"task": pickle.load(file), "monitor": mailbox})
events = mailbox.monitor.drain()
notes = [event.text for event in events if isinstance(event, NoteEvent)]
errors = {e.job_id: e.error for e in events if isinstance(e, StateEvent) and e.error}
print(json.dumps({**done, "notes": notes, "errors": errors}))
"""


def train_short(tmp_path: Path, tiny_base: Path, room: int) -> dict[str, Any]:
    """A pack of four in a process that may take `room` more bytes once the base is loaded."""
    fleet = write_fleet(tmp_path, tiny_base, {name: {} for name in SUBJECTS}, LARGE)
    folders = Folders.at(tmp_path / "state")
    task = pack_task(survey_of(fleet, folders), folders)
    (tmp_path / "task.pickle").write_bytes(pickle.dumps(task))
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-c", SHORT, str(tmp_path / "task.pickle"), str(room)],
        env={**os.environ, **ALLOCATOR, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_a_pack_that_runs_out_of_memory_goes_on_as_two(tmp_path: Path, tiny_base: Path) -> None:
    """The kernel refuses the address space of four subjects, and grants that of two."""
    no_prior = {"num_images": 0, "loss_weight": 0}
    train = make_job("rex", batch_size=16, resolution=64, prior=no_prior).train
    base = load_base(str(tiny_base))
    four, two = (predicted_bytes(base, [train] * count) for count in (4, 2))
    found = train_short(tmp_path, tiny_base, (four + two) // 2)
    assert len(found["published"]) == 4
    assert found["failed"] == []
    note = next(note for note in found["notes"] if "out of memory" in note)
    assert "with 4 subject(s)" in note
    assert "GiB predicted" in note
    assert "gradient_checkpointing: true" in note
    assert note.endswith("going on as 2 + 2")


def test_halves_that_run_out_again_fail_and_say_why(tmp_path: Path, tiny_base: Path) -> None:
    found = train_short(tmp_path, tiny_base, 24 << 20)
    assert found["published"] == []
    assert len(found["failed"]) == 4
    for error in found["errors"].values():
        assert "out of memory with 2 subject(s)" in error
        assert "free without it" in error
        assert "pack.max_subjects below 2" in error


def test_what_torch_says_out_of_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(OSError("Cannot allocate memory"))


def test_levers_that_are_pulled_already_are_not_named(tiny_base: Path) -> None:
    base = load_base(str(tiny_base))
    error = shortage(base, [make_job("rex", gradient_checkpointing=True).train])
    assert isinstance(error, TrainingError)
    assert "gradient_checkpointing" not in error.do
    assert "max_subjects" not in error.do
    assert "lower resolution" in error.do
    assert free_bytes(base.device) > 0
