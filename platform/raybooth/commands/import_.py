"""`raybooth import`: an adapter that was trained elsewhere becomes a published model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from raybooth.config.words import check_template
from raybooth.errors import InputError
from raybooth.home import store_folder
from raybooth.store import BaseRecord, Store


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "import",
        help="publish an adapter that was trained elsewhere",
        description="FILE is a LoRA in diffusers', PEFT's or kohya's form, as safetensors. It is "
        "checked layer by layer against the base. Words that are not given stay empty.",
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--subject", required=True, metavar="ID")
    parser.add_argument("--base", required=True, help="the base that it was trained on")
    parser.add_argument("--revision", metavar="COMMIT", help="of a base on the Hub")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="its learned tokens, if any")
    parser.add_argument("--class-noun", default="", metavar="NOUN")
    parser.add_argument("--identifier", default="", metavar="WORD")
    parser.add_argument("--instance-prompt", default="", metavar="PROMPT")
    parser.add_argument("--class-prompt", default="", metavar="PROMPT")
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> int:
    from raybooth.foreign import import_adapter
    from raybooth.model.base import fingerprint_base, resolve_base

    folder = resolve_base(arguments.base, arguments.revision)
    base = BaseRecord(
        name=arguments.base, fingerprint=fingerprint_base(folder), revision=arguments.revision
    )
    words = {
        "subject_id": arguments.subject,
        "class_noun": arguments.class_noun,
        "identifier": arguments.identifier,
        "instance_prompt": _filled("--instance-prompt", arguments.instance_prompt, arguments),
        "class_prompt": _filled("--class-prompt", arguments.class_prompt, arguments),
    }
    store = Store(store_folder())
    record = import_adapter(store, arguments.file, base, folder, words, arguments.tokens)
    if arguments.json:
        print(record.model_dump_json(indent=2))
    else:
        count = f"{record.num_parameters:,} numbers of rank {record.rank}"
        print(f"{record.reference}: {count}, from {arguments.file.name}")
    return 0


def _filled(option: str, template: str, arguments: argparse.Namespace) -> str:
    try:
        check_template(option, template)
    except ValueError as error:
        raise InputError(f"{option} cannot be used", template, str(error)) from error
    words = {"identifier": arguments.identifier, "class_noun": arguments.class_noun}
    return template.format(**words)
