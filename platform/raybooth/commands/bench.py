"""`raybooth bench dreambench FOLDER`: the paper's protocol as one fleet, beside its own figures."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.commands.evaluate import add_options, check_options, figure, judges_of
from raybooth.dreambench import PUBLISHED, BenchSubject, fleet_text, read_subjects
from raybooth.errors import RequestError
from raybooth.home import home, priors_folder, store_folder
from raybooth.store import Store

if TYPE_CHECKING:
    from raybooth.fleet.evaluation import EvaluationTask


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser("bench", help="published protocols, run as fleets")
    commands = parser.add_subparsers(metavar="BENCH", required=True)
    dreambench = commands.add_parser(
        "dreambench",
        help="train and evaluate the subjects of the DreamBooth paper's dataset",
        description="Writes a fleet file, trains and publishes every subject on Ray, draws and "
        "scores each subject's 25 prompts 4 times, a Ray task a subject, and prints the paper's "
        "table with ours beside it. Run again, it goes on where it stopped.",
    )
    dreambench.add_argument("folder", metavar="FOLDER", type=Path)
    dreambench.add_argument("--base", default="pocket", help="as in fleet files (default: pocket)")
    dreambench.add_argument("--revision", metavar="COMMIT", help="of a Hub id")
    dreambench.add_argument("--train", default="pocket-lora", help="a config of configs/train")
    dreambench.add_argument("--subjects", default="", metavar="A,B", help="these subjects only")
    dreambench.add_argument(
        "--prompts", type=int, default=25, metavar="N", help="the first N of the 25 prompts only"
    )
    dreambench.add_argument("--json", action="store_true", help="one JSON document on stdout")
    add_options(dreambench)
    dreambench.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """0 when every subject is evaluated, 1 when some failed, 130 when stopped by Ctrl-C."""
    check_options(arguments)
    if not 1 <= arguments.prompts <= 25:
        raise RequestError("--prompts is out of range", str(arguments.prompts), "use 1 to 25")
    names = [name for name in arguments.subjects.split(",") if name]
    subjects = read_subjects(arguments.folder, names)
    folder = home() / "dreambench"
    folder.mkdir(exist_ok=True)
    fleet = folder / "fleet.yaml"
    base = str(Path(arguments.base).absolute()) if Path(arguments.base).is_dir() else arguments.base
    train = arguments.train
    train = str(Path(train).absolute()) if Path(train).is_file() else train
    fleet.write_text(fleet_text(subjects, base, arguments.revision, train), encoding="utf-8")
    with contextlib.redirect_stdout(sys.stderr):
        code = _train(fleet)
        if code == 130:
            return code
        results, failed = _evaluate(arguments, fleet, subjects, folder)
    for subject_id, reason in failed.items():
        print(f"raybooth: {subject_id} was not evaluated: {reason}", file=sys.stderr)
    document = _document(results, [one.subject_id for one in subjects], failed)
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        _show(document)
    return 1 if document["missing"] else 0


def _train(fleet: Path) -> int:
    from raybooth.commands.train import run as train

    return train(argparse.Namespace(fleet=fleet, json=False))


def _evaluate(
    arguments: argparse.Namespace, fleet: Path, subjects: tuple[BenchSubject, ...], folder: Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(each published subject's report, drawn now or in an earlier run, reasons of failures)."""
    tasks = _tasks(arguments, fleet, subjects)
    reports = [folder / task.report_name for task in tasks]
    missing = [task for task, path in zip(tasks, reports, strict=True) if not path.exists()]
    failed = _draw_and_score(missing, folder) if missing else {}
    found = [path.read_text(encoding="utf-8") for path in reports if path.exists()]
    return [json.loads(text) for text in found], failed


def _draw_and_score(tasks: list[EvaluationTask], folder: Path) -> dict[str, str]:
    from raybooth.fleet.evaluation_cluster import evaluate_on_cluster
    from raybooth.fleet.launch import cluster
    from raybooth.pocket.progress import stage

    total = sum(task.sampling.num_pictures for task in tasks)
    with cluster() as can_grow, stage("pictures", total) as tell:
        return evaluate_on_cluster(
            tasks, folder, can_grow=can_grow, on_progress=lambda drawn: tell(drawn, "")
        )


def _tasks(
    arguments: argparse.Namespace, fleet: Path, subjects: tuple[BenchSubject, ...]
) -> list[EvaluationTask]:
    """One for each published subject."""
    from raybooth.data.prior import PriorCache
    from raybooth.evaluation import Sampling
    from raybooth.fleet.evaluation import EvaluationTask
    from raybooth.fleet.survey import survey_fleet

    survey = survey_fleet(fleet, PriorCache(priors_folder()))
    jobs = {job.subject.subject_id: job for job in survey.jobs}
    store = Store(store_folder())
    image_encoder, clip = judges_of(arguments, survey.fleet.base)
    tasks = []
    for subject in subjects:
        job = jobs[subject.subject_id]
        record = store.published_job(subject.subject_id, job.job_id)
        if record is None:
            continue
        config = job.subject.train
        sampling = Sampling(
            prompts=subject.prompts[: arguments.prompts],
            class_prompt=config.class_prompt,
            images_per_prompt=arguments.images,
            class_images=arguments.class_images,
            seed=arguments.seed,
            solver=config.samples.solver,
            num_inference_steps=config.samples.num_inference_steps,
            guidance_scale=config.samples.guidance_scale,
            side=config.resolution,
            zero_terminal_snr=record.zero_terminal_snr,
        )
        photos = job.subject.images
        judged = EvaluationTask(
            store.root, record, photos, sampling, image_encoder, clip, config.resources
        )
        tasks.append(judged)
    return tasks


def _document(
    results: list[dict[str, Any]], asked: list[str], failed: dict[str, str]
) -> dict[str, Any]:
    from raybooth.evaluation import mean_scores, scores_from

    keys = ("dino", "clip_i", "clip_t", "pres", "div", "ceiling")
    scores = [scores_from({key: one[key] for key in keys}) for one in results]
    done = {one["subject"].partition("@")[0] for one in results}
    return {
        "ours": mean_scores(scores).as_dict() if scores else None,
        "published": [asdict(row) for row in PUBLISHED],
        "subjects": results,
        "missing": [name for name in asked if name not in done],
        "failed": failed,
        "num_images": sum(len(one["prompts"]) * one["images_per_prompt"] for one in results),
        "note": "published rows: 30 subjects x 25 prompts x 4 images, DINO ViT-S/16 and CLIP; "
        "ours are comparable only with these encoders and all 30 subjects; div is not LPIPS",
    }


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("method", "DINO", "CLIP-I", "CLIP-T", "PRES", "DIV")
    for row in document["published"]:
        table.add_row(row["method"], *(figure(row[k]) for k in ("dino", "clip_i", "clip_t")))
    ours = document["ours"]
    if ours is not None:
        table.add_section()
        real = ours["ceiling"]
        table.add_row("ours: real images", figure(real["dino"]), figure(real["clip_i"]))
        keys = ("dino", "clip_i", "clip_t", "pres", "div")
        table.add_row("ours: RayBooth", *(figure(ours[key]) for key in keys))
        table.add_section()
        for one in document["subjects"]:
            table.add_row(one["subject"], *(figure(one[key]) for key in keys))
    console.print(table)
    encoders = [one["encoders"] for one in document["subjects"]][:1]
    for each in encoders:
        print(f"encoders: {each['image']['source']}, {each['clip']['source']}")
    print(document["note"])
    if document["missing"]:
        print(f"not evaluated: {', '.join(document['missing'])}", file=sys.stderr)
