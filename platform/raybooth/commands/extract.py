"""`raybooth extract SUBJECT[@VERSION]`: a full fine-tune as an adapter that a bank can serve."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.commands.evaluate import add_options, check_options, figure, task_of
from raybooth.config import EngineConfig
from raybooth.errors import BaseModelError, InputError, StoreError
from raybooth.home import store_folder
from raybooth.store import AdapterRecord, Store, check_subject_id

if TYPE_CHECKING:
    from raybooth.extract import ExtractRequest
    from raybooth.fleet.evaluation import EvaluationTask
    from raybooth.model.lora import AdapterTensors

SCORES = ("dino", "clip_i", "clip_t", "pres", "div")
WORST_SITES = 5


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "extract",
        help="publish a full fine-tune as an adapter of low rank",
        description="The nearest adapter of a rank to every weight that a full fine-tune moved "
        "(truncated SVD), published as the subject's next version with what was lost: errors by "
        "layer, of the denoiser's output, and of subject fidelity where photos and encoders are at "
        "hand.",
    )
    most = EngineConfig().max_rank
    parser.add_argument("reference", metavar="SUBJECT[@VERSION]")
    parser.add_argument(
        "--rank", type=int, default=most, metavar="R", help=f"(default {most}, a server's max_rank)"
    )
    parser.add_argument(
        "--energy",
        type=float,
        metavar="E",
        help="the least rank up to R that keeps this share of the layers' squared change, as 0.95",
    )
    parser.add_argument("--targets", choices=("attention", "all"), default="all")
    parser.add_argument(
        "--as", dest="subject_id", metavar="SUBJECT", help="publish as another subject's version"
    )
    parser.add_argument("--base", help="read the base from here, not from where it was trained")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--no-evaluation", action="store_true", help="draw and judge nothing")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="the instance images")
    parser.add_argument("--prompts", type=int, metavar="N", help="the first N sample prompts only")
    add_options(parser)
    parser.set_defaults(run=_extract, images=2, class_images=0)


def _extract(arguments: argparse.Namespace) -> int:
    check_options(arguments)
    if arguments.subject_id is not None:
        check_subject_id(arguments.subject_id)
    with contextlib.redirect_stdout(sys.stderr):  # where libraries' own words go
        record, notes = _publish(arguments)
    if arguments.json:
        print(json.dumps({**record.model_dump(mode="json"), "notes": notes}, indent=2))
    else:
        _show(record, notes)
    return 0


def _publish(arguments: argparse.Namespace) -> tuple[AdapterRecord, list[str]]:
    """The published record, and what its caller should know besides."""
    from raybooth.extract import extract_adapter, extract_request, publish_extract

    store = Store(store_folder())
    source = store.fetch(arguments.reference)
    chosen = arguments.rank, arguments.energy, arguments.targets, arguments.subject_id
    request = extract_request(source, *chosen)
    if wrong := store.verify(source.reference):
        raise StoreError(f"{source.reference} is damaged", "; ".join(wrong), "train it again")
    earlier = store.published_job(request.published_as, request.job_id)
    if isinstance(earlier, AdapterRecord):
        return earlier, [f"extracted before: {earlier.reference} is this very adapter"]
    task, notes = _task(arguments, request)

    import torch

    from raybooth.model.base import load_base

    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = arguments.base or source.base.name
    revision = None if arguments.base else source.base.revision
    base = load_base(place, revision=revision, device=device)
    record, tensors = extract_adapter(base, request, store.folder(source.reference))
    if task is not None:
        record = _judged(record, tensors, task, device)
    if record.rank > EngineConfig().max_rank:
        notes.append(f"served where engine.max_rank is {record.rank} or more")
    return publish_extract(store, record, tensors), notes


def _task(
    arguments: argparse.Namespace, request: ExtractRequest
) -> tuple[EvaluationTask | None, list[str]]:
    """What is judged, or why nothing is; raises what was asked for and cannot be."""
    from raybooth.fleet.evaluation import find_photos

    named = (arguments.photos, arguments.image_encoder, arguments.clip, arguments.prompts)
    asked = any(value is not None for value in named)
    if arguments.no_evaluation and asked:
        found = "--photos, --prompts, --image-encoder or --clip"
        raise InputError("--no-evaluation leaves nothing to judge", found, "leave one of them out")
    if arguments.no_evaluation:
        return None, []
    try:
        if arguments.base is not None:
            raise BaseModelError("a model is evaluated on its own base", f"--base {arguments.base}")
        task = task_of(arguments, request.source)
        find_photos(request.source, task.photos)
    except InputError as error:
        if asked:
            raise
        return None, [f"subject fidelity was not measured: {error}"]
    return task, []


def _judged(
    record: AdapterRecord, tensors: AdapterTensors, task: EvaluationTask, device: str
) -> AdapterRecord:
    """The record with the scores of the full fine-tune and of the adapter, on the same seeds."""
    from raybooth.extract import publish_extract
    from raybooth.fleet.evaluation import evaluate

    assert record.extracted is not None
    full = evaluate(task, device)
    with tempfile.TemporaryDirectory(prefix="raybooth-") as name:
        draft = publish_extract(Store(Path(name)), record, tensors)
        extract = evaluate(replace(task, store=Path(name), record=draft), device)
    fidelity = {
        kind: {score: document[score] for score in SCORES}
        for kind, document in (("full", full), ("extract", extract))
    }
    encoders = {kind: judge["sha256"] for kind, judge in full["encoders"].items()}
    changes = {"fidelity": fidelity, "encoders": encoders}
    return record.model_copy(update={"extracted": record.extracted.model_copy(update=changes)})


def _show(record: AdapterRecord, notes: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    loss = record.extracted
    assert loss is not None
    table = Table("what is lost", record.reference, title=f"{loss.source} at rank {record.rank}")
    table.add_row("of the layers it moves", f"{loss.sites_error:.4f}")
    worst = sorted(loss.sites, key=loss.sites.__getitem__, reverse=True)[:WORST_SITES]
    for site in worst:
        table.add_row(f"  {site}", f"{loss.sites[site]:.4f}")
    table.add_row("of every trained parameter", f"{loss.total_error:.4f}")
    table.add_row("squared change outside these layers", f"{loss.outside_energy:.2%}")
    for output in loss.outputs:
        name = f"of the output's move at timestep {output.timestep}"
        table.add_row(name, f"{output.of_move:.4f} ({output.of_output:.2%} of the output)")
    if loss.fidelity is not None:
        for score in SCORES:
            full, extract = (figure(loss.fidelity[kind][score]) for kind in ("full", "extract"))
            table.add_row(f"{score}, full and extracted", f"{full}  {extract}")
    console = Console()
    console.print(table)
    size_mb = sum(file.size_bytes for file in record.files.values()) / 1e6
    console.print(f"{record.reference}: {record.num_parameters:,} numbers, {size_mb:.1f} MB")
    for note in notes:
        console.print(note, markup=False)
