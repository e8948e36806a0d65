"""How far a long job has come: a bar in a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 20.0


@contextmanager
def stage(name: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Within it, call what it gives with (done, note); the bar or the lines follow."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=total, note="")
            yield lambda done, note: bar.update(task, completed=done, note=note)
        return
    start = last = time.monotonic()

    def line(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S or done >= total:
            last = now
            print(  # noqa: T201
                f"{name}: {done}/{total} {note} ({now - start:.0f} s)", file=sys.stderr, flush=True
            )

    yield line
