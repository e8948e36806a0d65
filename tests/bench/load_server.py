"""`raybooth serve` in a process of its own, as people start it: keys, subjects, its memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raybooth.model.base import load_base
from raybooth.model.lora import LoraPair, find_sites
from raybooth.store import Store
from tests.raybooth_serving.published import publish

START_S = 300.0
READY = " at http"


@dataclass(frozen=True, slots=True)
class Server:
    """An endpoint that listens."""

    url: str
    keys: dict[str, str]
    """Secrets by tenant."""

    pid: int

    def memory(self) -> dict[str, int]:
        """Resident bytes of the engine replica and of the gateway."""
        sizes = {"engine": 0, "gateway": 0}
        for pid in _descendants(self.pid):
            try:
                name = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except OSError:
                continue
            for part in sizes:
                if name.startswith("ray::") and part in name.lower():
                    sizes[part] += pages * os.sysconf("SC_PAGE_SIZE")
        return sizes

    def engine_s(self) -> float:
        """CPU seconds that the engine replicas have computed."""
        seconds = 0.0
        for pid in self.replicas():
            times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            seconds += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        return seconds

    def replicas(self) -> set[int]:
        """Process ids of the engine replicas: another one means that one has died."""
        found = set()
        for pid in _descendants(self.pid):
            try:
                name = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
            except OSError:
                continue
            if name.startswith("ray::") and "engine" in name.lower():
                found.add(pid)
        return found


@contextmanager
def serving(
    folder: Path, subjects: Sequence[str], tenants: Sequence[str], engine: dict[str, Any]
) -> Iterator[Server]:
    """The endpoint with those subjects published and a key for each tenant; gone afterwards."""
    home = folder / "home"
    _publish(home, subjects)
    environment = {**os.environ, "RAYBOOTH_HOME": str(home), "OMP_NUM_THREADS": "1"}
    raybooth = [sys.executable, "-m", "raybooth.cli"]
    keys = {}
    for tenant in tenants:
        command = [*raybooth, "keys", "create", tenant, "--subjects", "*"]
        made = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        keys[tenant] = made.stdout.strip()
    config = folder / "serve.yaml"
    base = {"base": "pocket", "num_gpus": 0, "engine": engine, "defaults": {"guidance_scale": 3}}
    config.write_text(json.dumps({"port": 0, "bases": [base], "auth": {"required": "always"}}))
    log = folder / "serve.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*raybooth, "serve", "--config", str(config)],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            yield Server(_url(process, log), keys, process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """What it prints when it is ready."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        lines = [line for line in log.read_text().splitlines() if READY in line]
        if lines:
            return "http" + lines[-1].partition(READY)[2]
        time.sleep(0.5)
    raise RuntimeError(f"the endpoint did not start:\n{log.read_text()[-2000:]}")


def _publish(home: Path, subjects: Sequence[str]) -> None:
    base = load_base("pocket")
    sites = find_sites(base.denoiser, "all")
    for seed, subject_id in enumerate(subjects):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            site.name: LoraPair(
                torch.randn(site.down_shape(8), generator=generator) / 8,
                torch.randn(site.up_shape(8), generator=generator) / 50,
            )
            for site in sites
        }
        publish(Store(home / "models"), base, subject_id, seed, rank=8, tensors=tensors)


def _descendants(root: int) -> set[int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, known = {root}, 0
    while len(found) > known:
        known = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found
