"""`raybooth models`: what the store holds; show, verify, alias and delete."""

from __future__ import annotations

import argparse
import json
from typing import Any

from raybooth.errors import StoreError
from raybooth.home import store_folder
from raybooth.store import Record, Store


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser("models", help="list, verify, alias or delete published models")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=_list)
    actions = parser.add_subparsers(metavar="ACTION")
    show = actions.add_parser("show", help="print the record of SUBJECT[@VERSION]")
    show.add_argument("reference", metavar="SUBJECT[@VERSION]")
    show.set_defaults(run=_show)
    verify = actions.add_parser("verify", help="compare files with their checksums")
    verify.add_argument("references", metavar="SUBJECT[@VERSION]", nargs="*")
    verify.set_defaults(run=_verify)
    alias = actions.add_parser("alias", help="point an alias at a version")
    alias.add_argument("reference", metavar="SUBJECT[@VERSION]")
    alias.add_argument("alias")
    alias.set_defaults(run=_alias)
    delete = actions.add_parser("delete", help="remove a version, or a subject with all versions")
    delete.add_argument("reference", metavar="SUBJECT[@VERSION]")
    delete.set_defaults(run=_delete)


def _list(arguments: argparse.Namespace) -> int:
    store = Store(store_folder())
    records = list(store.records())
    if arguments.json:
        print(json.dumps([_row(store, record) for record in records], indent=2))
        return 0
    if not records:
        print("no subject is published yet; `raybooth train FLEET` publishes some")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "aliases", "class noun", "prompt", "base", "steps", "loss", "created")
    for record in records:
        row = _row(store, record)
        loss = f"{record.loss_curve[-1][1]:.4f}" if record.loss_curve else ""
        base = f"{record.base.name} {record.base.fingerprint[:8]}"
        cells = (record.reference, ", ".join(row["aliases"]), record.class_noun)
        steps = "imported" if record.num_train_steps is None else str(record.num_train_steps)
        rest = (record.instance_prompt, base, steps, loss, record.created)
        table.add_row(*cells, *rest)
    Console().print(table)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    print(Store(store_folder()).fetch(arguments.reference).model_dump_json(indent=2))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    store = Store(store_folder())
    references = arguments.references or [record.reference for record in store.records()]
    damaged = []
    for reference in references:
        wrong = store.verify(reference)
        print(f"{reference}: {'; '.join(wrong) or 'whole'}")
        if wrong:
            damaged.append(reference)
    if damaged:
        raise StoreError("damaged models", ", ".join(damaged), "delete and train them again")
    return 0


def _alias(arguments: argparse.Namespace) -> int:
    store = Store(store_folder())
    subject_id, version = store.resolve(arguments.reference)
    store.set_alias(subject_id, arguments.alias, version)
    print(f"{subject_id}@{arguments.alias} is {subject_id}@{version}")
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    for reference in Store(store_folder()).delete(arguments.reference):
        print(f"deleted {reference}")
    return 0


def _row(store: Store, record: Record) -> dict[str, Any]:
    aliases = store.aliases(record.subject_id).items()
    return {
        "id": record.reference,
        "kind": record.kind,
        "subject_id": record.subject_id,
        "version": record.version,
        "aliases": sorted(name for name, version in aliases if version == record.version),
        "class_noun": record.class_noun,
        "identifier": record.identifier,
        "instance_prompt": record.instance_prompt,
        "base": record.base.model_dump(),
        "num_train_steps": record.num_train_steps,
        "loss": record.loss_curve[-1][1] if record.loss_curve else None,
        "created": record.created,
        "folder": str(store.folder(record.reference)),
    }
