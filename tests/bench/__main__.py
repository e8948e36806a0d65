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

from tests.bench.rounds import BenchReport, TableReport, machine

RESULTS = Path(__file__).parent / "results"
BENCHES = ("training", "serving", "fleet", "states", "full")
LONG = ("serving_mix",)
"""Run when named only: a quarter of an hour each round."""


def main() -> int:
    if sys.argv[1:2] == ["load"]:
        return int(importlib.import_module("tests.bench.load").main(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "benches",
        nargs="*",
        default=BENCHES,
        metavar="BENCH",
        help=f"{', '.join(BENCHES)}; when named: {', '.join(LONG)}; see also `load --help`",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    tables: list[TableReport] = []
    for name in options.benches:
        console.rule(name)
        found = importlib.import_module(f"tests.bench.{name}").run(options.rounds)
        for report in found:
            table = report.table() if isinstance(report, BenchReport) else report
            print_table(table, console)
            tables.append(table)
    if not options.no_file:
        path = write_tables(tables)
        console.print(f"written to {path}")
    return 0


def print_table(table: TableReport, console: Console) -> None:
    """To the terminal."""
    printed = Table(*table.heads, title=table.title)
    for row in table.rows:
        printed.add_row(*row)
    console.print(printed)
    for note in table.notes:
        console.print(note)


def write_tables(tables: list[TableReport]) -> Path:
    """A dated file of all tables, named by the first words of their titles."""
    facts = machine()
    lines = [f"# Benches of {datetime.now(UTC):%Y-%m-%d}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for table in tables:
        lines += ["", f"## {table.title}", "", f"Command: `{table.command}`", ""]
        lines += [f"| {' | '.join(table.heads)} |", "|---" * len(table.heads) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in table.rows]
        lines += ["", *table.notes] if table.notes else []
    RESULTS.mkdir(exist_ok=True)
    kind = "cpu" if facts["gpu"] == "none" else "gpu"
    names = "-".join(
        dict.fromkeys(table.title.split(":")[0].split()[0].lower() for table in tables)
    )
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{kind}-{names}.md"
    path.write_text("\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
