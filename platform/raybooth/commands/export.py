"""`raybooth export`: a published model as a file or folder that another program reads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from raybooth.errors import BaseModelError, StoreError
from raybooth.home import store_folder
from raybooth.store import Store

FORMATS = ("diffusers", "kohya", "pipeline")


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "export",
        help="write a published model for diffusers, A1111 or ComfyUI",
        description="diffusers: what `load_lora_weights` reads. kohya: what A1111 and ComfyUI "
        "read. pipeline: a whole diffusers folder, the adapter merged into the weights. PATH is a "
        "folder, or a .safetensors file for the first two.",
    )
    parser.add_argument("reference", metavar="SUBJECT[@VERSION]")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PATH")
    parser.add_argument("--base", help="read the base from here, not from where it was trained")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    store = Store(store_folder())
    record = store.fetch(arguments.reference)
    if wrong := store.verify(record.reference):
        raise StoreError(f"{record.reference} is damaged", "; ".join(wrong), "train it again")

    from raybooth.export import check_output, export_model
    from raybooth.model.base import fingerprint_base, resolve_base

    check_output(arguments.output, force=arguments.force)
    source = arguments.base or record.base.name
    base_folder = resolve_base(source, None if arguments.base else record.base.revision)
    if fingerprint_base(base_folder) != record.base.fingerprint:
        found = f"{source}, not {record.base.name} {record.base.fingerprint[:12]}"
        do = "name its own base with --base"
        raise BaseModelError(f"{record.reference} was trained on another base", found, do)
    written = export_model(
        record,
        store.folder(record.reference),
        base_folder,
        arguments.format,
        arguments.output,
        force=arguments.force,
    )
    if arguments.json:
        files = [str(path) for path in written]
        report = {"id": record.reference, "format": arguments.format, "files": files}
        print(json.dumps({**report, "path": str(arguments.output)}, indent=2))
    else:
        size = sum(path.stat().st_size for path in written) / 1e6
        print(f"{record.reference} as {arguments.format}: {arguments.output} ({size:.1f} MB)")
    return 0
