"""`raybooth check FLEET`: everything that is wrong with a fleet, or the plan for it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raybooth.fleet.planner import FleetPlan
    from raybooth.fleet.survey import Survey


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "check",
        help="check a fleet file, its photos and its base, and show the plan",
        description="Lists everything that is wrong, or prints packs, priors, steps and memory. "
        "Trains nothing and loads no weights.",
    )
    parser.add_argument("fleet", metavar="FLEET", type=Path, help="fleet file (YAML 1.2)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan; raises InputProblems when there is something to mend."""
    from raybooth.data.prior import PriorCache
    from raybooth.fleet.machine import this_machine
    from raybooth.fleet.planner import plan_fleet
    from raybooth.fleet.survey import survey_fleet
    from raybooth.home import priors_folder, store_folder
    from raybooth.store import Store

    survey = survey_fleet(arguments.fleet, PriorCache(priors_folder()))
    store = Store(store_folder())
    published = {}
    for job in survey.jobs:
        record = store.published_job(job.subject.subject_id, job.job_id)
        if record is not None:
            published[job.job_id] = record.reference
    waiting = [
        job.plan_job(survey.base_fingerprint) for job in survey.jobs if job.job_id not in published
    ]
    can_grow = bool(os.environ.get("RAY_ADDRESS"))
    machine = this_machine()
    memory = survey.pack_memory(has_gpus=machine.has_gpus)
    plan = plan_fleet(waiting, machine, memory, can_grow=can_grow)
    if arguments.json:
        print(json.dumps(_document(survey, plan, published), indent=2))
        return 0
    for warning in survey.warnings:
        print(f"raybooth: warning: {warning}", file=sys.stderr)
    _show(survey, plan, published)
    if can_grow:
        print("planned for this machine; the cluster at RAY_ADDRESS may run more packs at once")
    return 0


def _document(survey: Survey, plan: FleetPlan, published: dict[str, str]) -> dict[str, Any]:
    subjects = {job.job_id: job.subject.subject_id for job in survey.jobs}
    return {
        "fleet": str(survey.fleet.source),
        "base": {"name": survey.fleet.base, "fingerprint": survey.base_fingerprint},
        "warnings": list(survey.warnings),
        "published": [published[job_id] for job_id in subjects if job_id in published],
        "subjects": [
            {
                "subject_id": job.subject.subject_id,
                "job_id": job.job_id,
                "class_noun": job.subject.class_noun,
                "instance_prompt": job.subject.instance_prompt,
                "num_images": len(job.subject.images),
                "num_train_steps": job.subject.train.num_train_steps,
                "prior": None if job.prior_key is None else job.prior_key.digest,
            }
            for job in survey.jobs
        ],
        "packs": [
            {
                "pack_id": pack.pack_id,
                "subjects": [subjects[job_id] for job_id in pack.job_ids],
                "num_workers": pack.num_workers,
                "num_cpus": pack.resources.num_cpus,
                "num_gpus": pack.resources.num_gpus,
                "num_rows": pack.num_rows,
                "num_train_steps": pack.num_train_steps,
                "memory_bytes": pack.memory_bytes,
                "waits_for": list(pack.priors),
            }
            for pack in plan.packs
        ],
        "priors": [
            {
                "digest": prior.need.digest,
                "class_prompt": prior.need.class_prompt,
                "num_images": prior.need.num_images,
                "num_cached": min(prior.need.num_cached, prior.need.num_images),
                "num_missing": prior.need.num_missing,
                "num_subjects": len(prior.job_ids),
            }
            for prior in plan.priors
        ],
        "num_train_steps": sum(
            job.subject.train.num_train_steps for job in survey.jobs if job.job_id not in published
        ),
    }


def _show(survey: Survey, plan: FleetPlan, published: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    document = _document(survey, plan, published)
    base = document["base"]
    print(f"{document['fleet']}: {len(survey.jobs)} subjects, nothing wrong")
    print(f"base {base['name']}, fingerprint {base['fingerprint'][:12]}")
    if published:
        print(f"already published, skipped: {', '.join(document['published'])}")
    if plan.packs:
        packs = Table("pack", "subjects", "worker", "rows", "train steps", "memory", "waits for")
        prompts = {prior.need.digest: prior.need.class_prompt for prior in plan.priors}
        for pack, entry in zip(plan.packs, document["packs"], strict=True):
            packs.add_row(
                pack.pack_id,
                ", ".join(entry["subjects"]),
                f"{pack.num_workers} of " * (pack.num_workers > 1) + str(pack.resources),
                str(pack.num_rows),
                str(pack.num_train_steps),
                f"{pack.memory_bytes / 2**30:.1f} GiB",
                ", ".join(repr(prompts[digest]) for digest in pack.priors) or "nothing",
            )
        console.print(packs)
    if plan.priors:
        priors = Table("class prompt", "subjects", "images", "cached", "to make")
        for entry in document["priors"]:
            names = ("num_subjects", "num_images", "num_cached", "num_missing")
            priors.add_row(repr(entry["class_prompt"]), *(str(entry[name]) for name in names))
        console.print(priors)
    print(f"{document['num_train_steps']} subject train steps in all")
