"""`raybooth keys`: who may call the endpoint; create, list, rotate and revoke API keys."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from typing import Any

from raybooth.errors import InputError


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser("keys", help="create, list, rotate or revoke API keys")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a key; its secret is shown this once")
    create.add_argument("name", metavar="NAME")
    create.add_argument(
        "--subjects",
        metavar="GLOB",
        nargs="+",
        default=(),
        help="subjects that it may see, such as 'dog-*' or '*' (default: the bases only)",
    )
    create.add_argument("--rate-images-per-minute", metavar="N", type=float, help="default: any")
    create.add_argument("--expires", metavar="DATE", help="2027-01-31, or a time with its offset")
    create.set_defaults(run=_create)
    listing = actions.add_parser("ls", help="list the keys, without their secrets")
    listing.add_argument("--json", action="store_true", help="one JSON document on stdout")
    listing.set_defaults(run=_list)
    rotate = actions.add_parser("rotate", help="give a key another secret; the old one ends now")
    rotate.add_argument("name", metavar="NAME")
    rotate.set_defaults(run=_rotate)
    revoke = actions.add_parser("revoke", help="end a key now; no restart is needed")
    revoke.add_argument("name", metavar="NAME")
    revoke.set_defaults(run=_revoke)


def _create(arguments: argparse.Namespace) -> int:
    from raybooth_serving.access.keys import parse_expiry

    rate = arguments.rate_images_per_minute
    if rate is not None and not 0 < rate < float("inf"):
        raise InputError("this rate cannot be used", f"{rate:g}", "give images a minute above 0")
    expires = None if arguments.expires is None else parse_expiry(arguments.expires)
    key, secret = _keyring().create(
        arguments.name,
        subjects=arguments.subjects,
        images_per_minute=rate,
        expires=expires,
    )
    seen = " ".join(key.subjects) or "no subject, only the bases (--subjects '*' for all)"
    _show(secret, f"key {key.name} ({key.id}) sees {seen}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    keys, now = _keyring().read(), datetime.now(UTC)
    if arguments.json:
        rows = [key.model_dump(mode="json", exclude={"sha256"}) for key in keys]
        print(json.dumps(rows, indent=2))
        return 0
    if not keys:
        print("no API key yet; `raybooth keys create NAME --subjects GLOB` makes one")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "id", "subjects", "images/min", "created", "expires")
    for key in keys:
        rate = "any" if key.images_per_minute is None else f"{key.images_per_minute:g}"
        expires = "never" if key.expires is None else f"{key.expires:%Y-%m-%d %H:%M} UTC"
        if key.is_expired(now):
            expires += " (past)"
        seen = " ".join(key.subjects) or "none"
        table.add_row(key.name, key.id, seen, rate, f"{key.created:%Y-%m-%d}", expires)
    Console().print(table)
    return 0


def _rotate(arguments: argparse.Namespace) -> int:
    key, secret = _keyring().rotate(arguments.name)
    _show(secret, f"key {key.name} ({key.id}) has another secret; the old one is refused now")
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    key = _keyring().revoke(arguments.name)
    print(f"key {key.name} ({key.id}) is refused from now on")
    return 0


def _show(secret: str, words: str) -> None:
    """The secret alone on stdout, so that a script can take it."""
    print(secret)
    print(f"{words}; its secret is kept nowhere else", file=sys.stderr)


def _keyring() -> Any:
    from raybooth.home import home
    from raybooth_serving.access.keys import FILE, Keyring

    return Keyring(home() / FILE)
