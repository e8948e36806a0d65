"""A state comes back as it was, or the one before it does, or the error says why not."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raybooth.errors import CheckpointError
from raybooth.training.checkpoint import CheckpointWriter, SlotState, load_latest, save_state

FIELDS = {
    "base": "abc",
    "seed": 3,
    "train": {"optimizer": {"betas": (0.9, 0.999)}, "crop": "center"},
}


def make_state(train_step: int = 4, size: int = 700) -> SlotState:
    generator = torch.Generator().manual_seed(train_step)
    return SlotState(
        flat_N=torch.randn(size, generator=generator),
        optimizer={
            "state1": torch.randint(0, 255, (size,), generator=generator).to(torch.uint8),
            "absmax1": torch.randn(3, generator=generator),
        },
        train_step=train_step,
        opt_step=train_step - 1,
        rank=4,
        layout="digest",
        loss_scale=32768.0,
        good_steps=17,
        curve_T3=torch.rand(train_step, 3, generator=generator, dtype=torch.float64),
    )


def same(found: SlotState | None, expected: SlotState) -> bool:
    if found is None or found.optimizer.keys() != expected.optimizer.keys():
        return False
    tensors = [(found.flat_N, expected.flat_N), (found.curve_T3, expected.curve_T3)]
    tensors += [(found.optimizer[key], value) for key, value in expected.optimizer.items()]
    plain = replace(found, flat_N=0, optimizer=0, curve_T3=0)  # type: ignore[arg-type]
    return plain == replace(expected, flat_N=0, optimizer=0, curve_T3=0) and all(  # type: ignore[arg-type]
        torch.equal(a, b) and a.dtype == b.dtype for a, b in tensors
    )


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = make_state()
    record = save_state(tmp_path / "job", state, FIELDS)
    assert record == tmp_path / "job" / "step-00000004.json"
    found = load_latest(tmp_path / "job", FIELDS)
    assert same(found.state, state)
    assert found.notes == ()


def test_no_folder_is_no_state(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "job", FIELDS).state is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save_state(tmp_path, make_state(step), FIELDS, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if name.endswith(".json")] == [
        "step-00000006.json",
        "step-00000008.json",
    ]
    assert len(names) == 4
    assert same(load_latest(tmp_path, FIELDS).state, make_state(8))


def test_saving_a_step_again_is_fine(tmp_path: Path) -> None:
    save_state(tmp_path, make_state(2), FIELDS)
    other = replace(make_state(2), loss_scale=1.0, flat_N=torch.zeros(700))
    save_state(tmp_path, other, FIELDS)
    assert same(load_latest(tmp_path, FIELDS).state, other)


def truncate(folder: Path) -> None:
    weights = max(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])


def flip(folder: Path) -> None:
    weights = max(folder.glob("*.safetensors"))
    payload = bytearray(weights.read_bytes())
    payload[-9] ^= 1
    weights.write_bytes(payload)


def remove(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def cut_record(folder: Path) -> None:
    record = max(folder.glob("*.json"))
    record.write_bytes(record.read_bytes()[:40])


def edit_record(folder: Path) -> None:
    record = max(folder.glob("*.json"))
    record.write_text(record.read_text().replace('"opt_step": 3', '"opt_step": 2'))


@pytest.mark.parametrize("damage", [truncate, flip, remove, cut_record, edit_record])
def test_a_damaged_latest_falls_back_and_says_so(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    save_state(tmp_path, make_state(2), FIELDS)
    save_state(tmp_path, make_state(4), FIELDS)
    damage(tmp_path)
    found = load_latest(tmp_path, FIELDS)
    assert same(found.state, make_state(2))
    assert len(found.notes) == 1
    assert "step-00000004.json is damaged" in found.notes[0]
    save_state(tmp_path, make_state(4), FIELDS)
    mended = load_latest(tmp_path, FIELDS)
    assert same(mended.state, make_state(4))
    assert mended.notes == ()


def test_with_every_state_damaged_training_starts_anew_and_says_so(tmp_path: Path) -> None:
    save_state(tmp_path, make_state(2), FIELDS)
    flip(tmp_path)
    found = load_latest(tmp_path, FIELDS)
    assert found.state is None
    assert "starting at train step 0" in found.notes[-1]


def test_a_half_written_state_is_not_read(tmp_path: Path) -> None:
    """What a process leaves that died before the rename."""
    save_state(tmp_path, make_state(2), FIELDS)
    (tmp_path / ".step-00000004.json.999.tmp").write_text("{")
    (tmp_path / "step-00000004-0123456789ab.safetensors").write_bytes(b"half")
    assert same(load_latest(tmp_path, FIELDS).state, make_state(2))
    save_state(tmp_path, make_state(6), FIELDS)
    assert not list(tmp_path.glob(".*"))


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    save_state(tmp_path, make_state(), FIELDS)
    other = {**FIELDS, "seed": 4, "train": {"optimizer": {"betas": (0.9, 0.99)}, "crop": "center"}}
    with pytest.raises(CheckpointError) as caught:
        load_latest(tmp_path, other)
    message = str(caught.value)
    assert "seed 3 (now 4)" in message
    assert "train.optimizer.betas [0.9, 0.999] (now [0.9, 0.99])" in message
    assert "crop" not in message
    assert "base" not in caught.value.found


def test_a_format_of_another_version_is_refused(tmp_path: Path) -> None:
    from raybooth.training import checkpoint

    record = save_state(tmp_path, make_state(), FIELDS)
    body = json.loads(record.read_text())
    del body["checksum"]
    body["format"] = 99
    body["checksum"] = checkpoint._checksum(body)
    record.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="format 99"):
        load_latest(tmp_path, FIELDS)


def test_a_full_disk_is_a_clear_error_and_the_older_state_stays(tmp_path: Path) -> None:
    save_state(tmp_path, make_state(2), FIELDS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(CheckpointError, match="train step 4 cannot be written") as caught:
            save_state(tmp_path, make_state(4), FIELDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free space" in caught.value.do
    assert not list(tmp_path.glob(".*"))
    found = load_latest(tmp_path, FIELDS)
    assert same(found.state, make_state(2))
    assert found.notes == ()


def test_the_writer_saves_snapshots_and_raises_what_failed(tmp_path: Path) -> None:
    with CheckpointWriter() as writer:
        for step in (2, 4):
            writer.save(tmp_path / "job", make_state(step), FIELDS, keep=2)
    assert same(load_latest(tmp_path / "job", FIELDS).state, make_state(4))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"), CheckpointWriter() as writer:
        writer.save(tmp_path / "file", make_state(2), FIELDS, keep=2)
