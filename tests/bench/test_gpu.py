"""The GPU bench runs whole on a CPU, with nothing installed beyond what it says it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = ("ray", "rich", "ruamel", "deepspeed", "fastapi")
RUN = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.argv = ["gpu", "--device", "cpu", "--tiny", "--out", sys.argv[1]]
runpy.run_module("tests.bench.gpu", run_name="__main__")
"""


def test_the_bench_runs_on_small_shapes(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "table.txt")],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    table = (tmp_path / "table.txt").read_text()
    for row in ("SD, tiny", "SDXL, tiny", "pack of 2", "PEFT", "processes", "swapped", "mixed"):
        assert row in table
    assert "died" not in table
