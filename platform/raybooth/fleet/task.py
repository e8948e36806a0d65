"""What a pack's worker is told: picklable, complete, nothing that it must look up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raybooth.fleet.planner import Resources
from raybooth.home import home
from raybooth.subject import Subject


@dataclass(frozen=True, slots=True)
class Folders:
    """Where state lives; the same absolute paths on every node."""

    store: Path
    priors: Path
    checkpoints: Path
    encoded: Path
    runs: Path

    @classmethod
    def at(cls, root: Path) -> Folders:
        """The folders of a state folder."""
        return cls(
            store=root / "models",
            priors=root / "priors",
            checkpoints=root / "checkpoints",
            encoded=root / "encoded",
            runs=root / "runs",
        )

    @classmethod
    def of_home(cls) -> Folders:
        """The folders of RAYBOOTH_HOME."""
        return cls.at(home())


@dataclass(frozen=True, slots=True)
class Member:
    """A subject of a pack."""

    job_id: str
    subject: Subject


@dataclass(frozen=True, slots=True)
class PackTask:
    """One pack to train."""

    pack_id: str
    run_name: str
    base: str
    revision: str | None
    base_fingerprint: str
    members: tuple[Member, ...]
    resources: Resources
    max_failures: int
    folders: Folders

    @property
    def is_full(self) -> bool:
        """Whether this is one subject's full run, not a pack of adapters."""
        return self.members[0].subject.train.method == "full"

    @property
    def num_workers(self) -> int:
        """Workers of `resources` each."""
        return self.members[0].subject.train.full.num_workers if self.is_full else 1


@dataclass(frozen=True, slots=True)
class PackOutcome:
    """How a pack ended."""

    published: tuple[str, ...]
    failed: tuple[str, ...]
    stopped: tuple[str, ...]
    """Unfinished jobs, their states on disk."""
