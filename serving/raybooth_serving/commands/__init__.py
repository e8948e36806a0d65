"""`raybooth serve`, `keys` and `replay`: one file a command."""

from __future__ import annotations

from typing import Any

from raybooth_serving.commands import keys, replay, serve


def register(subparsers: Any) -> None:
    """Add the commands of serving."""
    for command in (serve, keys, replay):
        command.register(subparsers)
