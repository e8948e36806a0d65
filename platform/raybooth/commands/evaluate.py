"""`raybooth evaluate SUBJECT[@VERSION]`: the DreamBooth paper's metrics of a published subject."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.config import SamplesConfig
from raybooth.errors import InputError, RequestError, SubjectError
from raybooth.home import home, store_folder
from raybooth.store import Record, Store

if TYPE_CHECKING:
    from raybooth.encoders import Encoders
    from raybooth.evaluation import Sampling, Scores
    from raybooth.model.base import Base


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


def load_judges(arguments: argparse.Namespace, base_name: str, device: str) -> Encoders:
    """The encoders that were asked for; those of the pocket world judge its own base alone."""
    from raybooth.encoders import POCKET, load_encoders

    for option in ("image_encoder", "clip"):
        if getattr(arguments, option) is None and base_name != POCKET:
            flag = f"--{option.replace('_', '-')}"
            raise InputError(
                f"the base {base_name} needs {flag}",
                "only the pocket base brings encoders of its own world",
                "name a folder or a Hub id at a commit",
            )
    return load_encoders(arguments.image_encoder or POCKET, arguments.clip or POCKET, device)


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


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    store = Store(store_folder())
    record = store.fetch(arguments.reference)
    photos = find_photos(record, arguments.photos)
    samples = SamplesConfig.model_validate(record.train.get("samples", {}))
    prompts = samples.prompts[: arguments.prompts]
    if not prompts:
        raise RequestError("there is no prompt to evaluate", record.reference, "use --prompts 1")

    import torch

    from raybooth.evaluation import Sampling
    from raybooth.model.base import load_base

    device = "cuda" if torch.cuda.is_available() else "cpu"
    judges = load_judges(arguments, record.base.name, device)
    base = load_base(record.base.name, revision=record.base.revision, device=device)
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
    scores = evaluate_record(base, record, photos, sampling, judges)
    return describe(record, scores, sampling, judges, len(photos))


def evaluate_record(
    base: Base, record: Record, photos: list[Path], sampling: Sampling, judges: Encoders
) -> Scores:
    """Draws the published model's samples on `base` and scores them."""
    from raybooth.commands.generate import take_on, text_of
    from raybooth.data.images import load_photo
    from raybooth.evaluation import Words, draw, score

    words = Words(record.identifier, record.class_noun)
    bank = take_on(base, record)
    try:
        slot = 0 if bank is None else 1
        samples = draw(base, bank, slot, words, sampling, text_of(base, record))
    finally:
        if bank is not None:
            bank.detach()
    plain = [words.plain(template) for template in sampling.prompts]
    return score(judges, [load_photo(path) for path in photos], samples, plain)


def find_photos(record: Record, folder: Path | None) -> list[Path]:
    """The instance images that the record names, each checked by its bytes.

    Raises SubjectError when one is not there or another picture by now.
    """
    from raybooth.data.images import photo_digest

    if folder is not None:
        paths = [path for path in sorted(folder.iterdir()) if path.is_file()]
    else:
        paths = _trained_on(record)
    by_digest = {photo_digest(path): path for path in paths if path.is_file()}
    missing = [photo.name for photo in record.photos if photo.sha256 not in by_digest]
    if missing or not record.photos:
        found = f"not found: {', '.join(missing)}" if missing else "the record names none"
        do = "name the folder that holds them with --photos"
        raise SubjectError(f"the photos of {record.reference} are needed", found, do)
    return [by_digest[photo.sha256] for photo in record.photos]


def describe(
    record: Record, scores: Scores, sampling: Sampling, judges: Encoders, num_photos: int
) -> dict[str, Any]:
    """The scores and all that they depend on."""
    return {
        "subject": record.reference,
        **scores.as_dict(),
        "num_instance_images": num_photos,
        "prompts": list(sampling.prompts),
        "images_per_prompt": sampling.images_per_prompt,
        "class_images": sampling.class_images,
        "seed": sampling.seed,
        "encoders": {
            "image": {"source": judges.image.source, "sha256": judges.image.fingerprint},
            "clip": {"source": judges.clip.source, "sha256": judges.clip.fingerprint},
        },
    }


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
