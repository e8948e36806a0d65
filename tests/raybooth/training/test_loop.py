"""Resumed is uninterrupted (equivalence 3); what finished, failed or stopped is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.raybooth.training.jobs import four_jobs, make_job, relative, spoil
from torch import Tensor

from raybooth.errors import CheckpointError
from raybooth.model.base import Base
from raybooth.training.checkpoint import SlotState, load_latest
from raybooth.training.job import SlotJob, SlotReport
from raybooth.training.loop import PackReport, job_fields, train_pack
from raybooth.training.pack import Pack

ROOT = Path(__file__).parents[3]
STEPS = 6


def run(
    base: Base, jobs: Sequence[SlotJob], root: Path, stop_after: int | None = None
) -> PackReport:
    """Train until the ends, or for `stop_after` pack steps."""
    steps: list[int] = []
    return train_pack(
        base,
        jobs,
        checkpoint_root=root,
        on_report=lambda reports: steps.append(1),
        should_stop=lambda: len(steps) == stop_after,
    )


def states(base: Base, jobs: Sequence[SlotJob], root: Path) -> dict[str, SlotState]:
    found = {job.job_id: load_latest(root / job.job_id, job_fields(base, job)) for job in jobs}
    return {name: report.state for name, report in found.items() if report.state is not None}


def numbers(state: SlotState) -> list[Tensor]:
    moments = [state.optimizer[key] for key in sorted(state.optimizer)]
    return [state.flat_N, *moments, state.curve_T3]


def assert_same_bits(
    found: dict[str, SlotState], expected: dict[str, SlotState], jobs: Sequence[SlotJob]
) -> None:
    for job in jobs:
        ours, theirs = found[job.job_id], expected[job.job_id]
        assert ours.train_step == theirs.train_step == job.train.num_train_steps
        assert ours.opt_step == theirs.opt_step
        for left, right in zip(numbers(ours), numbers(theirs), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resumed_is_uninterrupted_bit_for_bit_at_every_train_step(
    precision: str, base: Base, tmp_path: Path
) -> None:
    jobs = four_jobs() if precision == "fp32" else [make_job("robot", precision=precision)]
    jobs.append(make_job("beads", precision=precision, optimizer={"name": "adamw8bit"}))
    run(base, jobs, tmp_path / "whole")
    whole = states(base, jobs, tmp_path / "whole")
    for stop_after in range(1, STEPS):
        root = tmp_path / f"stopped-{stop_after}"
        first = run(base, jobs, root, stop_after)
        assert first.num_pack_steps == stop_after
        assert first.stopped
        second = run(base, jobs, root)
        assert second.num_pack_steps == STEPS - stop_after
        assert set(second.finished) == {job.job_id for job in jobs}
        assert_same_bits(states(base, jobs, root), whole, jobs)


def test_resumed_after_each_step_anew_is_uninterrupted_bit_for_bit(
    base: Base, tmp_path: Path
) -> None:
    jobs = four_jobs()
    run(base, jobs, tmp_path / "whole")
    while run(base, jobs, tmp_path / "halting", stop_after=1).stopped:
        pass
    whole = states(base, jobs, tmp_path / "whole")
    assert_same_bits(states(base, jobs, tmp_path / "halting"), whole, jobs)


def test_resumed_among_other_neighbours_is_uninterrupted_bit_for_bit(
    base: Base, tmp_path: Path
) -> None:
    """Another pack of the same shape: other subjects in it, other places."""
    jobs = [make_job(name, seed) for seed, name in enumerate(("robot", "vase", "dog-1", "cat"))]
    run(base, jobs, tmp_path / "whole")
    run(base, jobs, tmp_path / "moved", stop_after=2)
    moved = [jobs[3], jobs[0]]
    run(base, [make_job("beads", 7), *moved, make_job("cup", 8)], tmp_path / "moved")
    whole = states(base, jobs, tmp_path / "whole")
    assert_same_bits(states(base, moved, tmp_path / "moved"), whole, moved)


@pytest.mark.parametrize(("kind", "bound"), [("base64", 1e-10), ("base", 1e-4)])
def test_resumed_in_another_pack_is_uninterrupted(
    kind: str, bound: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Split 2 + 2 with a newcomer of higher rank: packs of other shapes, whose sums round anew."""
    base: Base = request.getfixturevalue(kind)
    jobs = four_jobs()
    run(base, jobs, tmp_path / "whole")
    run(base, jobs, tmp_path / "split", stop_after=2)
    newcomer = make_job("beads", adapter={"rank": 16})
    run(base, [newcomer, jobs[3], jobs[0]], tmp_path / "split")
    run(base, jobs[1:3], tmp_path / "split")
    whole = states(base, jobs, tmp_path / "whole")
    split = states(base, jobs, tmp_path / "split")
    for name, state in whole.items():
        assert split[name].train_step == state.train_step
        assert relative(split[name].flat_N.double(), state.flat_N.double()) <= bound
        assert relative(split[name].curve_T3, state.curve_T3) <= bound


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from raybooth.model.base import load_base
from raybooth.training.loop import train_pack
from tests.raybooth.training.test_loop import killed_jobs

torch.set_num_threads(1)
base, jobs = load_base(sys.argv[1]), killed_jobs()

def train_until(train_step, place, root):
    def kill(reached):
        if reached == train_step:
            os.kill(os.getpid(), signal.SIGKILL)

    seen = [0]

    def on_report(reports):
        seen[0] = reports[0].train_step
        if place == "before":
            kill(seen[0])

    def should_stop():
        if place == "after":
            kill(seen[0])
        return False

    train_pack(base, jobs, checkpoint_root=root, on_report=on_report, should_stop=should_stop)

for train_step in range(1, int(sys.argv[3])):
    for place in ("before", "after"):
        child = os.fork()
        if child == 0:
            train_until(train_step, place, Path(sys.argv[2]) / f"{place}-{train_step}")
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


def killed_jobs() -> list[SlotJob]:
    """Subjects that end at different train steps, one rhythm of checkpoints."""
    jobs = four_jobs(checkpoint={"every_steps": 2})
    return [*jobs, make_job("beads", optimizer={"name": "adamw8bit"})]


def test_a_pack_that_was_killed_at_any_train_step_ends_bit_for_bit(
    base: Base, tiny_folder: Path, tmp_path: Path
) -> None:
    """SIGKILL before and after the states of each train step are handed to the writer."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_folder), str(tmp_path), str(STEPS)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=True,
    )
    jobs = killed_jobs()
    run(base, jobs, tmp_path / "whole")
    whole = states(base, jobs, tmp_path / "whole")
    killed = [folder for folder in tmp_path.iterdir() if folder.name[:2] in ("be", "af")]
    assert len(killed) == 2 * (STEPS - 1)
    saved = 0
    for folder in killed:
        saved += any(state.train_step for state in states(base, jobs, folder).values())
        run(base, jobs, folder)
        assert_same_bits(states(base, jobs, folder), whole, jobs)
    assert saved >= STEPS


def test_a_torn_pack_goes_on_from_its_hindmost_slot(base: Base, tmp_path: Path) -> None:
    """The kill came between two slots' writes: one newest state is there, one is not."""
    jobs = [make_job("robot"), make_job("vase", num_train_steps=4), make_job("cat")]
    run(base, jobs, tmp_path / "whole")
    run(base, jobs, tmp_path / "torn", stop_after=5)
    for newest in ("robot-job/step-00000005.json", "cat-job/step-00000005.json"):
        (tmp_path / "torn" / newest).unlink()
    run(base, jobs[:1], tmp_path / "torn", stop_after=1)
    assert states(base, jobs, tmp_path / "torn")["robot-job"].train_step == 5
    report = run(base, jobs, tmp_path / "torn")
    assert report.num_pack_steps == 2
    whole = states(base, jobs, tmp_path / "whole")
    assert_same_bits(states(base, jobs, tmp_path / "torn"), whole, jobs)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_state_is_the_same_bits_in_another_pack(name: str, base: Base, tmp_path: Path) -> None:
    """Beside a newcomer of higher rank, in another slot."""
    job = make_job("robot", optimizer={"name": name})
    run(base, [job], tmp_path, stop_after=3)
    left = states(base, [job], tmp_path)
    pack = Pack(base, [make_job("beads", adapter={"rank": 16}), job], states=left)
    found = pack.state(job.job_id)
    pack.close()
    expected = left[job.job_id]
    assert all(map(torch.equal, numbers(found), numbers(expected)))
    assert (found.train_step, found.opt_step) == (expected.train_step, expected.opt_step)


def test_a_disk_that_is_full_fails_its_own_job(base: Base, tmp_path: Path) -> None:
    jobs = [make_job("robot"), make_job("vase"), make_job("cat", num_train_steps=3)]
    run(base, jobs, tmp_path / "whole")
    root = tmp_path / "full"
    run(base, jobs, root, stop_after=1)
    taken = root / "vase-job"
    taken.rename(tmp_path / "aside")
    taken.write_text("in the way")  # where a folder of states should be
    told: list[SlotReport] = []
    report = train_pack(base, jobs[1:2], checkpoint_root=root, on_report=told.extend)
    assert list(report.failed) == ["vase-job"]
    assert "cannot be written" in str(told[-1].error)
    assert "free space" in str(told[-1].error)
    taken.unlink()
    (tmp_path / "aside").rename(taken)
    run(base, jobs, root)
    whole = states(base, jobs, tmp_path / "whole")
    assert_same_bits(states(base, jobs, root), whole, jobs)


def test_a_damaged_checkpoint_costs_its_steps_only(base: Base, tmp_path: Path) -> None:
    jobs = [make_job("robot")]
    folder = tmp_path / "damaged" / jobs[0].job_id
    run(base, jobs, tmp_path / "whole")
    run(base, jobs, tmp_path / "damaged", stop_after=5)
    max(folder.glob("*.safetensors")).write_bytes(b"not a state")
    report = run(base, jobs, tmp_path / "damaged")
    assert report.num_pack_steps == 2
    assert len(report.notes) == 1
    assert "step-00000005.json is damaged" in report.notes[0]
    whole = states(base, jobs, tmp_path / "whole")
    assert_same_bits(states(base, jobs, tmp_path / "damaged"), whole, jobs)


def test_a_checkpoint_of_another_config_is_refused(base: Base, tmp_path: Path) -> None:
    run(base, [make_job("robot")], tmp_path, stop_after=2)
    other = make_job("robot", optimizer={"learning_rate": 9e-4})
    with pytest.raises(CheckpointError, match=r"train\.optimizer\.learning_rate 0\.001 \(now"):
        run(base, [other], tmp_path)
    rhythm = make_job("robot", checkpoint={"every_steps": 1}, pack={"max_subjects": 2})
    assert run(base, [rhythm], tmp_path).num_pack_steps == STEPS - 2


def test_what_finished_failed_was_cancelled_or_stopped_is_told(base: Base, tmp_path: Path) -> None:
    jobs = [make_job("robot", num_train_steps=3), spoil(make_job("vase")), make_job("cat")]
    jobs.append(make_job("dog", batch_size=2))
    reports: list[SlotReport] = []
    finished: list[tuple[str, int]] = []

    def on_finished(job: SlotJob, pack: Pack) -> None:
        state = load_latest(tmp_path / job.job_id, job_fields(base, job)).state
        assert state is not None
        assert torch.equal(state.flat_N, pack.state(job.job_id).flat_N)
        finished.append((job.subject_id, state.train_step))

    report = train_pack(
        base,
        jobs,
        checkpoint_root=tmp_path,
        on_report=reports.extend,
        should_stop=lambda: len(finished) > 0 and reports[-1].train_step == 5,
        on_finished=on_finished,
        cancelled=lambda: {"cat-job"} if len(reports) >= 8 else set(),
    )
    assert finished == [("robot", 3)]
    assert report.finished == ("robot-job",)
    assert list(report.failed) == ["vase-job"]
    assert "nan" in report.failed["vase-job"]
    assert report.cancelled == ("cat-job",)
    assert report.stopped == ("dog-job",)
    assert report.num_pack_steps == 5
    trained = [found for found in reports if found.status != "cancelled"]
    assert report.num_subject_steps == len(trained)
    assert report.subject_steps_per_s > 0
    assert states(base, jobs, tmp_path)["dog-job"].train_step == 5


def test_a_finished_job_is_handed_over_again_after_a_restart(base: Base, tmp_path: Path) -> None:
    """The process may have died between the last state and publishing."""
    jobs = [make_job("robot", num_train_steps=2), make_job("vase", num_train_steps=4)]
    run(base, jobs, tmp_path, stop_after=3)
    seen: list[str] = []
    report = train_pack(
        base,
        jobs,
        checkpoint_root=tmp_path,
        on_finished=lambda job, pack: seen.append(job.subject_id),
    )
    assert seen == ["robot", "vase"]
    assert report.num_subject_steps == 1
    assert report.finished == ("robot-job", "vase-job")


def test_the_loss_curve_is_whole_after_a_resume(base: Base, tmp_path: Path) -> None:
    job = make_job("robot")
    losses: list[float] = []
    for stop_at in (2, STEPS):

        def stop(stop_at: int = stop_at) -> bool:
            return len(losses) == stop_at

        def note(reports: list[SlotReport]) -> None:
            losses.extend(report.loss for report in reports)

        train_pack(base, [job], checkpoint_root=tmp_path, on_report=note, should_stop=stop)
    curve_T3 = states(base, [job], tmp_path)[job.job_id].curve_T3
    assert curve_T3[:, 0].tolist() == losses
    assert len(losses) == STEPS
