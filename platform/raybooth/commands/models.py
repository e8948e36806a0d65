"""`raybooth models`: what the store holds; show, verify, promote, roll back and delete."""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import Any

from raybooth.errors import NotPublishedError, StoreError
from raybooth.home import store_folder
from raybooth.store import PRODUCTION, Record, Store


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "models",
        help="list, verify, promote or delete published models",
        description="SUBJECT is its newest version (SUBJECT@latest), SUBJECT@3 that one, "
        "SUBJECT@production what was promoted, SUBJECT@preview the newest checkpoint of a job that "
        "still trains it. Endpoints see a change with their next request.",
    )
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
    promote = actions.add_parser("promote", help="point an alias at a version that is whole")
    promote.add_argument("reference", metavar="SUBJECT@VERSION")
    promote.add_argument("alias", nargs="?", default=PRODUCTION, help=f"(default {PRODUCTION})")
    promote.set_defaults(run=_promote)
    rollback = actions.add_parser("rollback", help="point an alias at what it pointed at before")
    rollback.add_argument("subject_id", metavar="SUBJECT")
    rollback.add_argument("alias", nargs="?", default=PRODUCTION, help=f"(default {PRODUCTION})")
    rollback.set_defaults(run=_rollback)
    history = actions.add_parser("history", help="every move of a subject's aliases")
    history.add_argument("subject_id", metavar="SUBJECT")
    history.set_defaults(run=_history)
    delete = actions.add_parser("delete", help="remove a version, or a subject with all versions")
    delete.add_argument("reference", metavar="SUBJECT[@VERSION]")
    delete.add_argument(
        "--with-aliases", action="store_true", help="also a version that aliases point at"
    )
    delete.set_defaults(run=_delete)


def _list(arguments: argparse.Namespace) -> int:
    store = Store(store_folder())
    records = [*store.records(), *_previews(store)]
    if arguments.json:
        print(json.dumps([_row(store, record) for record in records], indent=2))
        return 0
    if not records:
        print("no subject is published yet; `raybooth train FLEET` publishes some")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("model", no_wrap=True)
    for heading in ("aliases", "class noun", "prompt", "base", "steps", "loss", "created"):
        table.add_column(heading)
    for record in records:
        row = _row(store, record)
        loss = f"{record.loss_curve[-1][1]:.4f}" if record.loss_curve else ""
        base = f"{record.base.name} {record.base.fingerprint[:8]}"
        name = f"{record.subject_id}@preview" if record.preview else record.reference
        cells = (name, ", ".join(row["aliases"]), record.class_noun)
        steps = "imported" if record.num_train_steps is None else str(record.num_train_steps)
        rest = (record.instance_prompt, base, steps, loss, record.created)
        style = "dim" if record.preview is not None else None
        table.add_row(*cells, *rest, style=style)
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


def _promote(arguments: argparse.Namespace) -> int:
    store = Store(store_folder())
    subject_id = arguments.reference.partition("@")[0]
    before, now = store.promote(arguments.reference, arguments.alias)
    print(_moved(subject_id, arguments.alias, before, now))
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    store = Store(store_folder())
    before, now = store.roll_back(arguments.subject_id, arguments.alias)
    print(_moved(arguments.subject_id, arguments.alias, before, now))
    return 0


def _history(arguments: argparse.Namespace) -> int:
    for alias, moves in Store(store_folder()).alias_history(arguments.subject_id).items():
        for move in moves:
            version = "nothing" if move.version is None else f"version {move.version}"
            deleted = ", deleted since" if move.is_deleted else ""
            print(f"{move.time or 'before':25}  {alias}  {move.action} to {version}{deleted}")
    return 0


def _moved(subject_id: str, alias: str, before: int | None, now: int) -> str:
    was = "new" if before is None else f"was {subject_id}@{before}"
    return f"{subject_id}@{alias} is {subject_id}@{now} ({was})"


def _delete(arguments: argparse.Namespace) -> int:
    store = Store(store_folder())
    for reference in store.delete(arguments.reference, with_aliases=arguments.with_aliases):
        print(f"deleted {reference}")
    return 0


def _previews(store: Store) -> list[Record]:
    """Every preview that is still there when it is read."""
    records = []
    for subject_id in store.previewed():
        with contextlib.suppress(NotPublishedError):
            records.append(store.fetch(f"{subject_id}@preview"))
    return records


def _row(store: Store, record: Record) -> dict[str, Any]:
    if record.preview is not None:
        names = ["preview"]
    else:
        aliases = store.aliases(record.subject_id).items()
        names = sorted(name for name, version in aliases if version == record.version)
    return {
        "id": record.reference,
        "kind": record.kind,
        "is_preview": record.preview is not None,
        "subject_id": record.subject_id,
        "version": record.version,
        "aliases": names,
        "class_noun": record.class_noun,
        "identifier": record.identifier,
        "instance_prompt": record.instance_prompt,
        "base": record.base.model_dump(),
        "num_train_steps": record.num_train_steps,
        "loss": record.loss_curve[-1][1] if record.loss_curve else None,
        "created": record.created,
        "folder": str(store.folder(record.reference)),
    }
