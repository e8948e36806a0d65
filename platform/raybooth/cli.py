"""The `raybooth` command: finds the rooms' commands, runs one, turns errors into exit codes.

0 success, 2 what a person wrote is wrong, 1 something failed, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

from raybooth import __version__
from raybooth.errors import RayBoothError

COMMAND_MODULES = (
    "raybooth.commands.check",
    "raybooth.commands.train",
    "raybooth.commands.models",
    "raybooth.commands.generate",
    "raybooth.commands.export",
    "raybooth.commands.import_",
    "raybooth.commands.extract",
    "raybooth.commands.evaluate",
    "raybooth.commands.bench",
    "raybooth.commands.prior",
    "raybooth.pocket.commands",
)
ENTRY_POINT_GROUP = "raybooth.commands"


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; importing it loads neither torch nor ray."""
    parser = argparse.ArgumentParser(
        prog="raybooth",
        description="Fine-tune DreamBooth subjects in packs on Ray, and serve them in one batch.",
    )
    parser.add_argument("--version", action="version", version=f"raybooth {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMAND_MODULES:
        importlib.import_module(name).register(subparsers)
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        point.load()(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    debug = False
    _hush()
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells start background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        arguments = build_parser().parse_args(argv)
        debug = arguments.debug
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except RayBoothError as error:
        if debug:
            raise
        print(f"raybooth: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("raybooth: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug:
            raise
        named = f" ({error.filename})" if error.filename else ""
        print(f"raybooth: {error.strerror or error}{named}", file=sys.stderr)
        return 1


def _hush() -> None:
    """Libraries' advice about packages that RayBooth does not need stays off people's screens."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
