"""What names meant when the store last said so: for subjects in memory while the store is away.

Away is not deleted. The store is away when its folder is not to be seen or reading it fails for
another reason than that something is not there; what a readable store does not have is deleted.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import OrderedDict
from pathlib import Path
from threading import Lock

from raybooth.errors import StoreError
from raybooth.store import Record
from raybooth_serving.metrics import EngineMetrics

MAX_NAMES = 4096

logger = logging.getLogger(__name__)


class Recall:
    """Names to records, the least recently resolved forgotten first; any thread may ask."""

    def __init__(self, metrics: EngineMetrics, max_names: int = MAX_NAMES) -> None:
        self.metrics = metrics
        self.max_names = max_names
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._has_read = self._is_away = False
        self._lock = Lock()

    @property
    def has_read(self) -> bool:
        """Whether the store has ever answered: before, a folder that is not there is empty."""
        return self._has_read

    def store_answers(self) -> None:
        """The store has been read."""
        with self._lock:
            if self._is_away:
                logger.warning("the store is back")
            self._has_read, self._is_away = True, False

    def store_is_away(self, error: Exception) -> None:
        """The store could not be read."""
        with self._lock:
            self.metrics.store_away_requests += 1
            if not self._is_away:
                logger.warning("the store is away, subjects in memory go on: %s", error)
            self._is_away = True

    def note(self, name: str, record: Record) -> None:
        """The store says that `name` means `record`."""
        with self._lock:
            self._records[name] = record
            self._records.move_to_end(name)
            while len(self._records) > self.max_names:
                self._records.popitem(last=False)

    def last(self, name: str) -> Record | None:
        """What `name` meant when the store last said so."""
        with self._lock:
            return self._records.get(name)

    def subjects(self) -> set[str]:
        """Ids that some name here means."""
        with self._lock:
            return {record.subject_id for record in self._records.values()}

    def forget(self, subject_id: str) -> None:
        """Let go of every name of a subject."""
        with self._lock:
            for name in [n for n, r in self._records.items() if r.subject_id == subject_id]:
                del self._records[name]


def is_away(root: Path) -> bool:
    """Whether the store's folder is not to be seen: unmounted, unreachable, not a folder."""
    try:
        return not stat.S_ISDIR(os.stat(root).st_mode)
    except OSError:
        return True


def unreadable(error: Exception) -> OSError | None:
    """Why the store cannot be read, if that is what `error` says; not that something is gone."""
    cause = error.__cause__ if isinstance(error, StoreError) else error
    if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
        return cause
    return None
