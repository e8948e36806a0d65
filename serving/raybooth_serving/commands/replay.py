"""`raybooth replay`: draw an image again from its receipt, and say whether it is the same."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "replay",
        help="draw an image again from its receipt",
        description="Draw an image again, alone, from the receipt in a picture file or an answer, "
        "and say whether it is the same, level by level. Exit code 1 when it is not.",
    )
    parser.add_argument("source", metavar="RECEIPT.json|PICTURE", type=Path)
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write the image as PNG")
    parser.add_argument("--base", help="load the base from here, not by its name in the receipt")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    from raybooth_serving.pictures.files import read_receipt

    receipt = read_receipt(arguments.source)

    from raybooth.config import EngineConfig
    from raybooth.home import store_folder
    from raybooth.store import Store
    from raybooth_serving.pictures.fingerprint import fingerprint_engine
    from raybooth_serving.pictures.replay import compare, load_base_of, redraw

    store = Store(store_folder())
    base = load_base_of(receipt, store, arguments.base)
    image = redraw(base, store, receipt)
    engine = EngineConfig(max_rank=receipt.engine.rank, targets=receipt.engine.targets)
    content = arguments.source.read_bytes()
    picture = None if content.lstrip()[:1] == b"{" else content
    report = compare(image, receipt, fingerprint_engine(base, engine), picture)
    if arguments.output is not None:
        image.save(arguments.output, "PNG")
    if arguments.json:
        print(report.model_dump_json(indent=2))
    else:
        print(report.sentence())
    return 0 if report.equal else 1
