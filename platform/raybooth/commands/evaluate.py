"""`raybooth evaluate SUBJECT[@VERSION]`: the DreamBooth paper's metrics of a published subject."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.config import SamplesConfig
from raybooth.errors import InputError, RequestError
from raybooth.home import home, store_folder
from raybooth.store import Record, Store

if TYPE_CHECKING:
    from raybooth.fleet.evaluation import EvaluationTask


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="subject fidelity, prompt fidelity, prior preservation and diversity of a subject",
        description="Draws samples of a published subject and prints DINO, CLIP-I, CLIP-T, PRES "
        "and DIV (Ruiz et al. 2023, section 4) beside what two real photos reach. Nothing is "
        "kept; --json > FILE keeps it.",
    )
    parser.add_argument("reference", metavar="SUBJECT[@VERSION]")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="the instance images (default: where they were when the subject was trained)",
    )
    parser.add_argument("--prompts", type=int, metavar="N", help="the first N sample prompts only")
    add_options(parser)
    parser.set_defaults(run=run)


def add_options(parser: Any) -> None:
    """What every command that evaluates can be asked."""
    parser.add_argument(
        "--images", type=int, default=4, metavar="N", help="samples of each prompt (default 4)"
    )
    parser.add_argument(
        "--class-images",
        type=int,
        default=16,
        metavar="N",
        help="pictures of the class prompt for PRES, 0 for none (default 16)",
    )
    parser.add_argument("--seed", type=int, default=0)
    for name, what, example in (
        ("image-encoder", "DINO or DINOv2", "facebook/dino-vits16"),
        ("clip", "CLIP", "openai/clip-vit-base-patch32"),
    ):
        parser.add_argument(
            f"--{name}",
            metavar="SOURCE",
            help=f"{what}: `pocket`, a folder, or a Hub id at a commit, as {example}@COMMIT "
            "(default: `pocket`, for subjects of the pocket base)",
        )


def check_options(arguments: argparse.Namespace) -> None:
    """Raises RequestError for what cannot be drawn."""
    least = {"images": 1, "class_images": 0, "seed": 0}
    for name, lowest in least.items():
        value = getattr(arguments, name)
        if value < lowest:
            option = f"--{name.replace('_', '-')}"
            raise RequestError(f"{option} is out of range", str(value), f"use {lowest} or more")


def judges_of(arguments: argparse.Namespace, base_name: str) -> tuple[str, str]:
    """(image encoder, CLIP) that were asked for; the pocket world's judge its own base alone."""
    from raybooth.encoders import POCKET

    for option in ("image_encoder", "clip"):
        if getattr(arguments, option) is None and base_name != POCKET:
            flag = f"--{option.replace('_', '-')}"
            raise InputError(
                f"the base {base_name} needs {flag}",
                "only the pocket base brings encoders of its own world",
                "name a folder or a Hub id at a commit",
            )
    return arguments.image_encoder or POCKET, arguments.clip or POCKET


def run(arguments: argparse.Namespace) -> int:
    """Prints the scores; raises InputError when photos or encoders are missing."""
    check_options(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # where libraries' own words go
        document = _evaluate(arguments)
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        _show(document)
    return 0


def task_of(arguments: argparse.Namespace, record: Record) -> EvaluationTask:
    """What is asked of `record`; raises InputError where there is no prompt or nobody to judge."""
    from raybooth.evaluation import Sampling
    from raybooth.fleet.evaluation import EvaluationTask

    samples = SamplesConfig.model_validate(record.train.get("samples", {}))
    prompts = samples.prompts[: arguments.prompts]
    if not prompts:
        raise RequestError("there is no prompt to evaluate", record.reference, "use --prompts 1")
    image_encoder, clip = judges_of(arguments, record.base.name)
    folder = arguments.photos
    sampling = Sampling(
        prompts=prompts,
        class_prompt=record.train.get("class_prompt", record.class_prompt),
        images_per_prompt=arguments.images,
        class_images=arguments.class_images,
        seed=arguments.seed,
        solver=samples.solver,
        num_inference_steps=samples.num_inference_steps,
        guidance_scale=samples.guidance_scale,
        side=record.train.get("resolution"),
        zero_terminal_snr=record.zero_terminal_snr,
    )
    return EvaluationTask(
        store=store_folder(),
        record=record,
        photos=tuple(sorted(folder.iterdir()) if folder else _trained_on(record)),
        sampling=sampling,
        image_encoder=image_encoder,
        clip=clip,
    )


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    record = Store(store_folder()).fetch(arguments.reference)
    task = task_of(arguments, record)

    import torch

    from raybooth.fleet.evaluation import evaluate

    return evaluate(task, "cuda" if torch.cuda.is_available() else "cpu")


def _trained_on(record: Record) -> list[Path]:
    from raybooth.fleet.queue import Queue

    jobs = Queue(home() / "fleet.db").jobs()
    listed = [job.spec.get("photos", []) for job in jobs if job.job_id == record.job_id]
    return [Path(name) for name in listed[0]] if listed else []


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", document["subject"], "two real photos", "better")
    ceiling = document["ceiling"]
    rows = (
        ("DINO", "dino", ceiling["dino"], "higher, up to real photos"),
        ("CLIP-I", "clip_i", ceiling["clip_i"], "higher, up to real photos"),
        ("CLIP-T", "clip_t", None, "higher"),
        ("PRES", "pres", None, "lower"),
        ("DIV", "div", None, "higher"),
    )
    for name, key, real, better in rows:
        table.add_row(name, figure(document[key]), figure(real), better)
    Console().print(table)


def figure(value: float | None) -> str:
    """Three decimals, or a dash."""
    return "-" if value is None else f"{value:.3f}"
