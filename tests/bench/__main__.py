"""`make bench`: run the benches, print a table, write a dated result file."""

from __future__ import annotations

import argparse
import importlib
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests.bench.rounds import BenchReport, machine

RESULTS = Path(__file__).parent / "results"
BENCHES = ("training", "serving", "fleet", "states", "full")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "benches", nargs="*", default=BENCHES, metavar="BENCH", help=", ".join(BENCHES)
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    reports: list[BenchReport] = []
    for name in options.benches:
        console.rule(name)
        found = importlib.import_module(f"tests.bench.{name}").run(options.rounds)
        for report in found:
            _print(report, console)
        reports += found
    if not options.no_file:
        path = _write(reports)
        console.print(f"written to {path}")
    return 0


def _print(report: BenchReport, console: Console) -> None:
    heads = ("", report.unit, f"ratio to {report.reference}", "rounds")
    table = Table(*heads, title=report.title)
    for row in report.rows:
        spread = f"{min(row.ratios):.2f} - {max(row.ratios):.2f}"
        table.add_row(row.name, f"{row.median:.3g}", f"{row.ratio:.2f}", spread)
    console.print(table)
    for note in report.notes:
        console.print(note)


def _write(reports: list[BenchReport]) -> Path:
    facts = machine()
    lines = [f"# Benches of {datetime.now(UTC):%Y-%m-%d}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for report in reports:
        lines += ["", f"## {report.title}", "", f"Command: `{report.command}`", ""]
        lines += [f"| | {report.unit} | ratio to {report.reference} | lowest - highest |"]
        lines += ["|---|---|---|---|"]
        for row in report.rows:
            spread = f"{min(row.ratios):.2f} - {max(row.ratios):.2f}"
            lines.append(f"| {row.name} | {row.median:.3g} | {row.ratio:.2f} | {spread} |")
        lines += ["", *report.notes] if report.notes else []
    RESULTS.mkdir(exist_ok=True)
    kind = "cpu" if facts["gpu"] == "none" else "gpu"
    names = "-".join(
        dict.fromkeys(report.title.split(":")[0].split()[0].lower() for report in reports)
    )
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{kind}-{names}.md"
    path.write_text("\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
