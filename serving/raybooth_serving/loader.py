"""Published adapters in host memory, checked on the way in, least recently used out."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from raybooth.errors import BaseModelError, StoreError
from raybooth.model.lora import AdapterTensors, load_adapter
from raybooth.store import WEIGHTS, AdapterRecord, Store, describe_file
from raybooth_serving.metrics import EngineMetrics


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter ready to be written to a slot; `name` is its reference and content."""

    name: str
    tensors: AdapterTensors


class Loader:
    """Store to host memory; one thread at a time may load."""

    def __init__(
        self,
        store: Store,
        base_fingerprint: str,
        *,
        max_rank: int,
        max_adapters: int,
        metrics: EngineMetrics,
    ) -> None:
        self.store = store
        self.base_fingerprint = base_fingerprint
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
        adapter = HostAdapter(name, self._read(record))
        self.metrics.host_loads += 1
        self._adapters[name] = adapter
        while len(self._adapters) > self.max_adapters:
            self._adapters.popitem(last=False)
        return adapter

    def _read(self, record: AdapterRecord) -> AdapterTensors:
        if record.base.fingerprint != self.base_fingerprint:
            found = f"{record.base.name} {record.base.fingerprint[:12]}"
            raise BaseModelError(f"{record.reference} was trained on another base", found)
        if record.rank > self.max_rank:
            do = "raise engine.max_rank and serve again"
            found = f"rank {record.rank}, at most {self.max_rank}"
            raise BaseModelError(f"{record.reference} does not fit the bank", found, do)
        path = self.store.root / record.subject_id / str(record.version) / WEIGHTS
        do = "publish the subject again"
        try:
            is_whole = describe_file(path) == record.files[WEIGHTS]
        except OSError as error:
            found = error.strerror or str(error)
            what = f"the weights of {record.reference} cannot be read"
            raise StoreError(what, found, do) from error
        if not is_whole:
            what = f"the weights of {record.reference} are damaged"
            raise StoreError(what, "another checksum than published", do)
        return load_adapter(path)


def adapter_name(record: AdapterRecord) -> str:
    """`subject@version#content`: a version number that was deleted and given again differs."""
    return f"{record.reference}#{record.files[WEIGHTS].sha256[:16]}"
