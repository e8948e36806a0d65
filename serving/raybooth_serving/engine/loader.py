"""Published adapters in host memory: read whole, checked, least recently used out.

    store -> host memory -> a slot's row (page-locked where the base is on CUDA) -> slot

Any thread may load. An adapter is read once however many ask for it; a slow read holds up nobody
who asks for another. What somebody still holds (a slot, an image in flight) is found without the
store even after it has left the shelf, so a store that is away stops nothing that is resident.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

from raybooth.errors import BaseModelError, NotPublishedError, RequestError, StoreError
from raybooth.model.base import Base
from raybooth.model.compose import Share, compose, compose_words, composed_rank
from raybooth.model.learned import LearnedTokens, learned_of
from raybooth.model.lora import (
    AdapterTensors,
    denoiser_part,
    from_diffusers_keys,
    text_part,
)
from raybooth.model.tensor_file import TensorFile, parse_tensors
from raybooth.model.text_adapter import TextAdapter
from raybooth.store import LEARNED, WEIGHTS, AdapterRecord, Store
from raybooth_serving.engine.orders import Part
from raybooth_serving.engine.shelf import Shelf
from raybooth_serving.errors import StoreAwayError
from raybooth_serving.metrics import EngineMetrics
from raybooth_serving.names.recall import is_away

TOKENIZER_BYTES = 220
"""Of each token that a tokenizer knows (measured); learned words take a tokenizer of their own."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class HostAdapter:
    """An adapter ready to be written to a slot; `name` is its references and contents."""

    name: str
    tensors: AdapterTensors
    """Of the denoiser."""
    text: TextAdapter | None
    """What prompts mean to the subject; None: what they mean to the base."""
    size_bytes: int
    """In host memory."""


class Loader:
    """Store to host memory."""

    def __init__(
        self,
        store: Store,
        base: Base,
        *,
        max_rank: int,
        max_adapters: int,
        max_bytes: int,
        metrics: EngineMetrics,
    ) -> None:
        self.store = store
        self.base = base
        self.max_rank = max_rank
        self.metrics = metrics
        self._shelf: Shelf[str, HostAdapter] = Shelf(max_adapters, max_bytes, _size)
        self._alive: WeakValueDictionary[str, HostAdapter] = WeakValueDictionary()
        self._num_read = 0
        self._lock = Lock()

    def load(self, parts: Sequence[Part]) -> HostAdapter:
        """The adapter of one subject, or of several as one, their scales folded in.

        Raises BaseModelError for another base or a rank that the bank cannot hold, RequestError
        for subjects that do not go together, NotPublishedError for one deleted meanwhile,
        StoreError when weights are missing, differ from their checksum or cannot be read.
        """
        try:
            if len(parts) == 1:
                return self._one(parts[0].record)
            return self._get(composed_name(parts), lambda: self._compose(parts))
        finally:
            self._count()

    def holds(self, parts: Sequence[Part]) -> bool:
        """Whether `load` of these would need no store now."""
        name = adapter_name(parts[0].record) if len(parts) == 1 else composed_name(parts)
        with self._lock:
            return name in self._alive

    def forget(self, subject_id: str) -> None:
        """Let go of every adapter of a subject, also of those that it is a part of."""
        self._shelf.drop(lambda name: is_of(name, subject_id))
        with self._lock:
            for name in [name for name in self._alive if is_of(name, subject_id)]:
                del self._alive[name]
        self._count()

    def _one(self, record: AdapterRecord) -> HostAdapter:
        return self._get(adapter_name(record), lambda: self._read(record))

    def _get(self, name: str, make: Callable[[], HostAdapter]) -> HostAdapter:
        def find_or_make() -> HostAdapter:
            with self._lock:
                found = self._alive.get(name)
            return make() if found is None else found

        adapter = self._shelf.get(name, find_or_make)
        with self._lock:
            self._alive[name] = adapter
        return adapter

    def _read(self, record: AdapterRecord) -> HostAdapter:
        if record.base.fingerprint != self.base.fingerprint:
            found = f"{record.base.name} {record.base.fingerprint[:12]}"
            raise BaseModelError(f"{record.reference} was trained on another base", found)
        if record.rank > self.max_rank:
            do = "raise engine.max_rank and serve again"
            found = f"rank {record.rank}, at most {self.max_rank}"
            raise BaseModelError(f"{record.reference} does not fit the bank", found, do)
        tensors = from_diffusers_keys(self._file(record, WEIGHTS).tensors)
        learned = []
        if LEARNED in record.files:
            learned.append(learned_of(self._file(record, LEARNED), record.reference))
        with self._lock:
            self._num_read += 1
        return self._ready(adapter_name(record), tensors, learned)

    def _compose(self, parts: Sequence[Part]) -> HostAdapter:
        shares = [_share(part, self._one(part.record)) for part in parts]
        tensors = compose(shares)
        rank = composed_rank(denoiser_part(tensors))
        if rank > self.max_rank:
            ranks = " + ".join(str(part.record.rank) for part in parts)
            do = "ask for fewer subjects, or raise engine.max_rank and serve again"
            what = "these subjects together do not fit the bank"
            raise RequestError(what, f"ranks {ranks} at one site, at most {self.max_rank}", do)
        return self._ready(composed_name(parts), tensors, compose_words(shares))

    def _ready(
        self, name: str, tensors: AdapterTensors, learned: Sequence[LearnedTokens]
    ) -> HostAdapter:
        own, pairs = denoiser_part(tensors), text_part(tensors)
        text = TextAdapter(self.base, pairs, *learned) if pairs or learned else None
        size_bytes = _num_bytes(tensors)
        for words in learned:
            size_bytes += sum(vectors.nbytes for vectors in words.vectors.values())
        if learned:
            size_bytes += sum(TOKENIZER_BYTES * len(each) for each in self.base.tokenizers.values())
        return HostAdapter(name, own, text, size_bytes)

    def _file(self, record: AdapterRecord, name: str) -> TensorFile:
        """A published file, checked: what is checked is what is used."""
        label = record.reference.partition("@")[2]
        path, expected = self.store.root / record.subject_id / label / name, record.files[name]
        try:
            is_whole = path.stat().st_size == expected.size_bytes
            content = path.read_bytes() if is_whole else b""
        except OSError as error:
            raise self._unreadable(record, path, error) from error
        if not is_whole or hashlib.sha256(content).hexdigest() != expected.sha256:
            what = f"the weights of {record.reference} are damaged"
            raise StoreError(what, "another checksum than published", "publish the subject again")
        return parse_tensors(content, record.reference)

    def _unreadable(self, record: AdapterRecord, path: Path, error: OSError) -> Exception:
        found = error.strerror or str(error)
        if is_away(self.store.root) or not isinstance(error, FileNotFoundError):
            what = f"{record.reference} is not in memory, and the store cannot be read"
            return StoreAwayError(what, found, "try again when the store is back")
        if path.parent.is_dir():
            what = f"the weights of {record.reference} cannot be read"
            return StoreError(what, found, "publish the subject again")
        do = "see `raybooth models`"
        return NotPublishedError(f"{record.reference} has just been deleted", "", do)

    def _count(self) -> None:
        report, metrics = self._shelf.report(), self.metrics
        metrics.host_hits, metrics.host_loads = report.hits, self._num_read
        metrics.host_adapters, metrics.host_bytes = report.num_items, report.size_bytes
        metrics.host_evictions = report.evictions


def adapter_name(record: AdapterRecord) -> str:
    """`subject@version#content`: a version number that was deleted and given again differs."""
    files = [record.files[name] for name in (WEIGHTS, LEARNED) if name in record.files]
    return f"{record.reference}#{'.'.join(file.sha256[:16] for file in files)}"


def composed_name(parts: Sequence[Part]) -> str:
    """`subject@version#content*scale`, joined with `+`."""
    return "+".join(f"{adapter_name(part.record)}*{part.scale!r}" for part in parts)


def is_of(name: str, subject_id: str) -> bool:
    """Whether an adapter of that name holds weights of the subject."""
    return any(each.partition("@")[0] == subject_id for each in name.split("+"))


def _share(part: Part, adapter: HostAdapter) -> Share:
    text = adapter.text
    pairs, learned = ({}, ()) if text is None else (text.pairs, text.learned)
    tensors, record = {**adapter.tensors, **pairs}, part.record
    return Share(record.reference, tensors, learned, part.scale, record.zero_terminal_snr)


def _size(adapter: HostAdapter) -> int:
    return adapter.size_bytes


def _num_bytes(tensors: AdapterTensors) -> int:
    return sum(half.nbytes for pair in tensors.values() for half in pair)
