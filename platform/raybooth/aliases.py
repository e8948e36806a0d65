"""Names that point at versions of one subject, and all that they pointed at before.

The file is replaced by one rename; whoever changes it holds the subject's lock meanwhile (see
store.py), so that two writers lose nothing and a killed one leaves the old file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from raybooth.atomic import write_atomic
from raybooth.config import Strict
from raybooth.errors import InputError, NotPublishedError, StoreError

ALIASES = "aliases.json"
LATEST = "latest"
"""The newest version, unless it was pointed at another one by hand."""

PRODUCTION = "production"
"""What `promote` and `rollback` mean when no alias is named."""


class AliasMove(Strict):
    """One change of an alias."""

    action: Literal["set", "rollback"]
    version: int | None
    """Where it points from now on; None: nowhere, or for `latest` at the newest version."""

    time: str
    """UTC, ISO 8601; empty where it was not noted."""

    is_deleted: bool = False
    """The version was deleted since, so that its number may mean another model."""


class AliasFile(Strict):
    """`aliases.json`: every alias with its moves, oldest first."""

    schema_version: Literal[1] = 1
    aliases: dict[str, tuple[AliasMove, ...]]


class Aliases:
    """The aliases of the subject in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ALIASES

    def current(self) -> dict[str, int]:
        """Alias to version."""
        pointing = {alias: moves[-1].version for alias, moves in self.history().items()}
        return {alias: version for alias, version in pointing.items() if version is not None}

    def history(self) -> Mapping[str, tuple[AliasMove, ...]]:
        """Every alias that there ever was, with its moves, oldest first."""
        try:
            values = json.loads(self._path.read_text("utf-8"))
            if all(isinstance(version, int) for version in values.values()):
                return {alias: (_move("set", at, time=""),) for alias, at in values.items()}
            return AliasFile.model_validate(values).aliases
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, ValidationError) as error:
            found = " ".join(str(error).split())[:200]
            do = "delete it to fall back to the versions alone"
            raise StoreError(f"{self._path} is not readable", found, do) from error

    def point(self, alias: str, version: int | None) -> None:
        """Point `alias` at `version`; None takes it away."""
        if self.current().get(alias) != version:
            self._add(alias, _move("set", version))

    def before(self, alias: str) -> int | None:
        """The version that `alias` pointed at before; None: the newest one, by `latest` alone.

        Raises NotPublishedError for an alias that never was, InputError where nothing was before,
        or what was is deleted.
        """
        history = self.history()
        if alias not in history:
            found = f"aliases {', '.join(history) or 'none'}"
            raise NotPublishedError(f"there is no alias {alias!r} to roll back", found)
        stack = [AliasMove(action="set", version=None, time="")]
        for move in history[alias]:
            if move.action == "rollback":
                stack.pop()
            else:
                stack.append(move)
        target = stack[-2] if len(stack) > 1 else None
        do = "promote a version instead"
        if target is None or (target.version is None and alias != LATEST):
            raise InputError(f"the alias {alias!r} pointed at no version before", "", do)
        if target.is_deleted:
            found = f"version {target.version}"
            raise InputError(f"what {alias!r} pointed at before was deleted", found, do)
        return target.version

    def roll_back(self, alias: str) -> None:
        """Point `alias` at what it pointed at before; again, at what was before that."""
        self._add(alias, _move("rollback", self.before(alias)))

    def forget(self, versions: Collection[int]) -> None:
        """Note that `versions` are deleted; aliases that point at one are taken away."""
        history = {}
        for alias, moves in self.history().items():
            marked = tuple(
                move.model_copy(update={"is_deleted": move.is_deleted or move.version in versions})
                for move in moves
            )
            if marked[-1].version in versions:
                marked += (_move("set", None),)
            history[alias] = marked
        if history:
            self._write(history)

    def _add(self, alias: str, move: AliasMove) -> None:
        history = self.history()
        self._write({**history, alias: (*history.get(alias, ()), move)})

    def _write(self, history: Mapping[str, tuple[AliasMove, ...]]) -> None:
        file = AliasFile(aliases=dict(sorted(history.items())))
        write_atomic(self._path, file.model_dump_json(indent=2) + "\n")


def _move(
    action: Literal["set", "rollback"], version: int | None, time: str | None = None
) -> AliasMove:
    if time is None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
    return AliasMove(action=action, version=version, time=time)
