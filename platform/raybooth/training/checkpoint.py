"""A slot's whole training state on disk: published whole, checksummed, never half-written.

Shapes: N parameters of a slot in its own layout, T train steps done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from raybooth.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class SlotState:
    """All that a slot's next train step depends on, in the slot's own layout, on the CPU."""

    flat_N: Tensor
    optimizer: dict[str, Tensor]
    """exp_avg and exp_avg_sq, or state1, state2, absmax1, absmax2 of 8-bit AdamW."""
    train_step: int
    opt_step: int
    rank: int
    layout: str
    """Digest of the site names and shapes in the order of `flat_N`."""
    loss_scale: float
    good_steps: int
    """Train steps since the loss scale last changed."""
    curve_T3: Tensor
    """loss, instance loss, prior loss of every train step, float64."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The newest whole state of a job, and what was skipped to find it."""

    state: SlotState | None
    notes: tuple[str, ...] = ()


def save_state(folder: Path, state: SlotState, fields: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write `state` beside, fsync, rename; keep the newest `keep`; returns the record's path.

    `fields` says which job this is; `load_latest` refuses another. Raises CheckpointError when
    the disk does not take it; what was there before stays.
    """
    payload = safetensors_torch.save(_tensors_of(state))
    sha256 = hashlib.sha256(payload).hexdigest()
    stem = _stem(state.train_step)
    weights = folder / f"{stem}-{sha256[:12]}.safetensors"
    body = {
        "format": FORMAT,
        "train_step": state.train_step,
        "opt_step": state.opt_step,
        "rank": state.rank,
        "layout": state.layout,
        "loss_scale": state.loss_scale,
        "good_steps": state.good_steps,
        "weights": weights.name,
        "sha256": sha256,
        "fields": dict(fields),
    }
    record = folder / f"{stem}.json"
    text = json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(weights, payload)
        _write_whole(record, text.encode())
        _sync_folder(folder)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint at train step {state.train_step} cannot be written to {folder}",
            error.strerror or str(error),
            "free space or make the folder writable, then run the same command again",
        ) from error
    _prune(folder, keep)
    return record


def load_latest(
    folder: Path, fields: Mapping[str, Any], *, train_step: int | None = None
) -> LoadReport:
    """The newest whole state in `folder` (or that of `train_step`); a damaged one is passed
    over, with a note.

    Raises CheckpointError that names what differs when the state belongs to other `fields`.
    """
    notes: list[str] = []
    pattern = "step-*.json" if train_step is None else f"{_stem(train_step)}.json"
    for record in sorted(folder.glob(pattern), reverse=True):
        try:
            body, tensors = _read(record)
        except (_Damaged, OSError) as error:
            notes.append(f"checkpoint {record} is damaged ({error}); using the one before it")
            continue
        refuse_other_job(record, body["fields"], fields)
        curve_T3 = tensors.pop("curve_T3")
        flat_N = tensors.pop("flat_N")
        state = SlotState(
            flat_N=flat_N,
            optimizer={key.removeprefix("optimizer."): value for key, value in tensors.items()},
            train_step=body["train_step"],
            opt_step=body["opt_step"],
            rank=body["rank"],
            layout=body["layout"],
            loss_scale=body["loss_scale"],
            good_steps=body["good_steps"],
            curve_T3=curve_T3,
        )
        return LoadReport(state, tuple(notes))
    if notes:
        notes.append(f"no whole checkpoint in {folder}; starting at train step 0")
    return LoadReport(None, tuple(notes))


class CheckpointWriter:
    """Writes states on one background thread, at most one pending a folder.

    States are snapshots (copies), so training goes on meanwhile. What cannot be written is told
    by `errors`, folder by folder: one slot's disk is no other slot's trouble.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: dict[Path, Future[Path]] = {}
        self._errors: dict[Path, CheckpointError] = {}

    def save(self, folder: Path, state: SlotState, fields: Mapping[str, Any], keep: int) -> None:
        """Queue one state, once the folder's earlier one is written."""
        self._end(folder)
        self._pending[folder] = self._pool.submit(save_state, folder, state, fields, keep=keep)

    def flush(self) -> None:
        """Return when everything queued is on disk, or its error known."""
        for folder in tuple(self._pending):
            self._end(folder)

    def errors(self) -> dict[Path, CheckpointError]:
        """What could not be written since the last call, by folder."""
        for folder in [f for f, future in self._pending.items() if future.done()]:
            self._end(folder)
        errors, self._errors = self._errors, {}
        return errors

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.flush()
                for unseen in self.errors().values():
                    raise unseen
        finally:
            self._pool.shutdown(wait=True)

    def _end(self, folder: Path) -> None:
        future = self._pending.pop(folder, None)
        error = future.exception() if future is not None else None
        if isinstance(error, CheckpointError):
            self._errors[folder] = error
        elif error is not None:
            raise error


def _stem(train_step: int) -> str:
    return f"step-{train_step:08d}"


class _Damaged(Exception):
    pass


def _tensors_of(state: SlotState) -> dict[str, Tensor]:
    tensors = {"flat_N": state.flat_N, "curve_T3": state.curve_T3}
    tensors.update({f"optimizer.{key}": value for key, value in state.optimizer.items()})
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_whole(path: Path, payload: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` records, then the weights that no record names."""
    records = sorted(folder.glob("step-*.json"), reverse=True)
    for record in records[keep:]:
        record.unlink(missing_ok=True)
    kept = {record.stem for record in records[:keep]}
    for weights in folder.glob("step-*.safetensors"):
        if weights.stem.rsplit("-", 1)[0] not in kept:
            weights.unlink(missing_ok=True)
    for leftover in folder.glob(".step-*.tmp"):
        if leftover.suffixes[-2:-1] != [f".{os.getpid()}"]:
            leftover.unlink(missing_ok=True)


def _read(record: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        body = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _Damaged(f"the record is not JSON: {error}") from error
    if not isinstance(body, dict) or body.pop("checksum", None) != _checksum(body):
        raise _Damaged("the record's checksum does not match")
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {record} was written by another version of RayBooth",
            f"format {body['format']}",
            f"this one reads format {FORMAT}; move the folder away to start anew",
        )
    payload = (record.parent / body["weights"]).read_bytes()
    if hashlib.sha256(payload).hexdigest() != body["sha256"]:
        raise _Damaged("the weights' checksum does not match")
    try:
        return body, safetensors_torch.load(payload)
    except SafetensorError as error:
        raise _Damaged(f"the weights cannot be read: {error}") from error


def refuse_other_job(record: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    # Through JSON, so that tuples and lists compare as they were written.
    before, after = _flat(saved), _flat(json.loads(json.dumps(dict(now))))
    names = sorted(
        name for name in {*before, *after} if before.get(name, _ABSENT) != after.get(name, _ABSENT)
    )
    if names:
        found = ", ".join(
            f"{name} {before.get(name, 'absent')!r} (now {after.get(name, 'absent')!r})"
            for name in names
        )
        raise CheckpointError(
            f"checkpoint {record} belongs to another configuration",
            found,
            f"restore these values, or move {record.parent} away to start anew",
        )


_ABSENT = object()


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def snapshot(tensor: Tensor) -> Tensor:
    """A copy on the CPU that later train steps do not touch."""
    return tensor.detach().to("cpu", copy=True).contiguous()
