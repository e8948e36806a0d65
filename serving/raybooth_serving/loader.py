"""Published adapters in host memory, checked on the way in, least recently used out."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from raybooth.errors import BaseModelError, StoreError
from raybooth.model.base import Base
from raybooth.model.lora import AdapterTensors, denoiser_part, load_adapter
from raybooth.model.text_adapter import TextAdapter, load_text_adapter
from raybooth.store import LEARNED, WEIGHTS, AdapterRecord, Store, describe_file
from raybooth_serving.metrics import EngineMetrics


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter ready to be written to a slot; `name` is its reference and content."""

    name: str
    tensors: AdapterTensors
    """Of the denoiser."""
    text: TextAdapter | None
    """What prompts mean to the subject; None: what they mean to the base."""


class Loader:
    """Store to host memory; one thread at a time may load."""

    def __init__(
        self,
        store: Store,
        base: Base,
        *,
        max_rank: int,
        max_adapters: int,
        metrics: EngineMetrics,
    ) -> None:
        self.store = store
        self.base = base
        self.max_rank = max_rank
        self.max_adapters = max_adapters
        self.metrics = metrics
        self._adapters: OrderedDict[str, HostAdapter] = OrderedDict()

    def load(self, record: AdapterRecord) -> HostAdapter:
        """The adapter of `record`, read from the store unless it is in memory.

        Raises BaseModelError for another base or a rank that the bank cannot hold, StoreError
        when the weights are missing, differ from their checksum or cannot be read.
        """
        name = adapter_name(record)
        found = self._adapters.get(name)
        if found is not None:
            self._adapters.move_to_end(name)
            self.metrics.host_hits += 1
            return found
        tensors = self._read(record)
        learned = self._path(record, LEARNED) if LEARNED in record.files else None
        text = load_text_adapter(self.base, tensors, learned)
        adapter = HostAdapter(name, denoiser_part(tensors), text)
        self.metrics.host_loads += 1
        self._adapters[name] = adapter
        while len(self._adapters) > self.max_adapters:
            self._adapters.popitem(last=False)
        return adapter

    def _read(self, record: AdapterRecord) -> AdapterTensors:
        if record.base.fingerprint != self.base.fingerprint:
            found = f"{record.base.name} {record.base.fingerprint[:12]}"
            raise BaseModelError(f"{record.reference} was trained on another base", found)
        if record.rank > self.max_rank:
            do = "raise engine.max_rank and serve again"
            found = f"rank {record.rank}, at most {self.max_rank}"
            raise BaseModelError(f"{record.reference} does not fit the bank", found, do)
        return load_adapter(self._path(record, WEIGHTS))

    def _path(self, record: AdapterRecord, name: str) -> Path:
        """A published file, checked."""
        path = self.store.root / record.subject_id / str(record.version) / name
        do = "publish the subject again"
        try:
            is_whole = describe_file(path) == record.files[name]
        except OSError as error:
            found = error.strerror or str(error)
            what = f"the weights of {record.reference} cannot be read"
            raise StoreError(what, found, do) from error
        if not is_whole:
            what = f"the weights of {record.reference} are damaged"
            raise StoreError(what, "another checksum than published", do)
        return path


def adapter_name(record: AdapterRecord) -> str:
    """`subject@version#content`: a version number that was deleted and given again differs."""
    files = [record.files[name] for name in (WEIGHTS, LEARNED) if name in record.files]
    return f"{record.reference}#{'+'.join(file.sha256[:16] for file in files)}"
