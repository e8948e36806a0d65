"""`raybooth train FLEET`: trains every subject of a fleet in packs and publishes it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "train",
        help="train and publish the subjects of a fleet file",
        description="Starts a local Ray, or joins the one at RAY_ADDRESS. Ctrl-C stops cleanly; "
        "the same command goes on with what is unfinished and skips what is published.",
    )
    parser.add_argument("fleet", metavar="FLEET", type=Path, help="fleet file (YAML 1.2)")
    parser.add_argument("--json", action="store_true", help="one JSON event a line on stdout")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """0 when every subject is published, 1 when some failed, 130 when stopped by Ctrl-C."""
    from raybooth.fleet.machine import prepare_environment

    prepare_environment()  # before anything imports ray

    from raybooth.data.prior import PriorCache
    from raybooth.fleet.live import view_for
    from raybooth.fleet.queue import Queue
    from raybooth.fleet.rounds import train_fleet
    from raybooth.fleet.survey import survey_fleet
    from raybooth.fleet.task import Folders
    from raybooth.fleet.tracked import tracked
    from raybooth.home import home

    folders = Folders.of_home()
    survey = survey_fleet(arguments.fleet, PriorCache(folders.priors))
    for warning in survey.warnings:
        print(f"raybooth: warning: {warning}", file=sys.stderr)
    queue = Queue(home() / "fleet.db")
    view = tracked(view_for(sys.stdout, as_json=arguments.json), survey, home())
    with contextlib.redirect_stdout(sys.stderr):  # where Ray's own words go
        report = train_fleet(survey, queue, folders, view)
    for subject_id, reason in report.failed.items():
        print(f"raybooth: {subject_id} failed: {reason}", file=sys.stderr)
    if report.unfinished:
        names = ", ".join(report.unfinished)
        print(f"raybooth: stopped; unfinished: {names}; the same command resumes", file=sys.stderr)
        return 130
    if not arguments.json:
        print(f"{len(report.published)} published: {', '.join(report.published)}")
    return 1 if report.failed else 0
