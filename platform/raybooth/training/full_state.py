"""Checkpoints of a full run: each worker writes its own part in the background, none waits.

`step-<n>-rank-<r>.json` is sealed and names that worker's files with their checksums; a train
step is whole once every worker's part of it is. Safetensors only, as they lie on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from raybooth.config import CheckpointConfig
from raybooth.data.whole_file import (
    read_checked,
    remove_partial,
    seal,
    sha256_hex,
    unseal,
    way_out,
    write_whole,
)
from raybooth.errors import CheckpointError
from raybooth.training.checkpoint import refuse_other_job
from raybooth.training.full import FullState

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})-rank-(\d+)\.json")


def save_full_state(
    folder: Path, state: FullState, fields: Mapping[str, Any], *, rank: int, keep: int
) -> None:
    """Write one worker's part: files, then the record, each whole; keep its newest `keep`.

    At least two are kept, for another worker may die with its part of the newest unwritten.
    Raises CheckpointError when the disk does not take it; what was there before stays.
    """
    stem = f"step-{state.train_step:08d}-rank-{rank}"
    tensors = {"curve_T3": state.curve_T3}
    tensors |= {
        f"optimizer.{piece}.{name}": value
        for piece, moments in enumerate(state.optimizer)
        for name, value in moments.items()
    }
    payloads = {f"{stem}.safetensors": save(tensors)}
    for part, weights in state.weights.items():
        payloads[f"{stem}-{part}.safetensors"] = save(dict(weights))
    record = {
        "format": FORMAT,
        "train_step": state.train_step,
        "pieces": len(state.optimizer),
        "parts": list(state.weights),
        "files": {name: sha256_hex(payload) for name, payload in payloads.items()},
        "fields": dict(fields),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, payload in payloads.items():
            write_whole(folder / name, payload)
        write_whole(folder / f"{stem}.json", seal(record))
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint at train step {state.train_step} cannot be written to {folder}",
            error.strerror or str(error),
            way_out(error),
        ) from error
    _prune(folder, rank, max(2, keep))


def load_full_state(
    folder: Path, fields: Mapping[str, Any]
) -> tuple[FullState | None, tuple[str, ...]]:
    """The newest train step that every worker finds whole, and notes on those passed over.

    Every worker of the default process group must call it. Raises CheckpointError that names
    what differs when it belongs to other `fields`.
    """
    notes: list[str] = []
    rank = dist.get_rank()
    agreed: list[Any] = [sorted(_steps(folder, 0), reverse=True) if rank == 0 else []]
    dist.broadcast_object_list(agreed, src=0)
    for step in agreed[0]:
        state = _read(folder, step, rank, fields)
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, state is not None)
        if all(answers):
            return state, tuple(notes)
        bad = [number for number, is_whole in enumerate(answers) if not is_whole]
        notes.append(
            f"checkpoint at train step {step} in {folder} is not whole (worker "
            f"{', '.join(map(str, bad))}); using the one before it"
        )
    if notes:
        notes.append(f"no whole checkpoint in {folder}; starting at train step 0")
    return None, tuple(notes)


class FullWriter:
    """Writes one worker's states on a background thread; a failed write is told by `trouble`."""

    def __init__(
        self, folder: Path, fields: Mapping[str, Any], rank: int, config: CheckpointConfig
    ) -> None:
        self._folder, self._fields, self._rank, self._config = folder, fields, rank, config
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._error: Exception | None = None
        if rank == 0 and folder.is_dir():
            remove_partial(folder)

    def is_due(self, train_step: int) -> bool:
        """Whether the config wants a state of this train step."""
        return train_step % self._config.every_steps == 0

    def save(self, state: FullState) -> None:
        """Queue one state, once the one before is written."""
        self.flush()
        self._pending = self._pool.submit(
            save_full_state,
            self._folder,
            state,
            self._fields,
            rank=self._rank,
            keep=self._config.keep,
        )

    def flush(self) -> None:
        """Return when everything queued is on disk, or its error known."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.exception()
        if isinstance(error, CheckpointError):
            self._error = error
        elif error is not None:
            raise error

    def trouble(self) -> Exception | None:
        """What could not be written so far."""
        if self._pending is not None and self._pending.done():
            self.flush()
        return self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)


def _read(folder: Path, step: int, rank: int, fields: Mapping[str, Any]) -> FullState | None:
    """One worker's part of a train step with the first worker's weights; None unless whole."""
    own = _record(folder, step, rank)
    first = own if rank == 0 else _record(folder, step, 0)
    if own is None or first is None:
        return None
    name = f"step-{step:08d}-rank-{rank}"
    refuse_other_job(folder / f"{name}.json", own["fields"], fields)
    tensors = _tensors(folder, own, f"{name}.safetensors")
    weights = {}
    for part in first["parts"]:
        state = _tensors(folder, first, f"step-{step:08d}-rank-0-{part}.safetensors")
        if state is None:
            return None
        weights[part] = state
    if tensors is None:
        return None
    optimizer: list[dict[str, Tensor]] = [{} for _ in range(own["pieces"])]
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, piece, moment = key.split(".")
            optimizer[int(piece)][moment] = value
    return FullState(step, weights, optimizer, tensors["curve_T3"])


def _record(folder: Path, step: int, rank: int) -> dict[str, Any] | None:
    try:
        values = unseal((folder / f"step-{step:08d}-rank-{rank}.json").read_bytes())
    except FileNotFoundError:
        return None
    if values is not None and values["format"] != FORMAT:
        found = f"format {values['format']}, this RayBooth knows {FORMAT}"
        what = f"the checkpoints in {folder} were written by another version"
        raise CheckpointError(what, found, "move the folder away to start anew")
    return values


def _tensors(folder: Path, record: Mapping[str, Any], name: str) -> dict[str, Tensor] | None:
    data = read_checked(folder / name, record["files"][name])
    return None if data is None else load(data)


def _steps(folder: Path, rank: int) -> list[int]:
    matches = [_NAME.fullmatch(path.name) for path in folder.glob("step-*.json")]
    return [int(match[1]) for match in matches if match and int(match[2]) == rank]


def _prune(folder: Path, rank: int, keep: int) -> None:
    for step in sorted(_steps(folder, rank))[:-keep]:
        stem = f"step-{step:08d}-rank-{rank}"
        (folder / f"{stem}.json").unlink(missing_ok=True)
        for path in (folder / f"{stem}.safetensors", *folder.glob(f"{stem}-*.safetensors")):
            path.unlink(missing_ok=True)
