"""Priors by Ray tasks: shared work, one making, live progress, clear errors."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from raybooth.data.prior import PriorCache, PriorKey
from raybooth.data.prior_build import build_prior
from raybooth.errors import BaseModelError, PriorError
from raybooth.model.base import Base
from raybooth.model.sampler import GENERATOR_VERSION

pytestmark = pytest.mark.ray


@pytest.fixture
def task(tiny_base: Base, tiny_folder: Path, tmp_path: Path) -> Any:
    from raybooth.data.prior_cluster import PriorTask

    key = PriorKey(
        base_fingerprint=tiny_base.fingerprint,
        class_prompt="a photo of a dog",
        negative_prompt="",
        solver="ddim",
        num_inference_steps=2,
        guidance_scale=3.0,
        resolution=32,
        dtype="float32",
        generator_version=GENERATOR_VERSION,
    )
    return PriorTask(str(tiny_folder), None, tmp_path / "priors", key, num_images=6, max_rows=2)


def test_tasks_share_a_prior_and_equal_a_local_making(
    ray_session: Any, task: Any, tiny_base: Base, tmp_path: Path
) -> None:
    from raybooth.data.prior_cluster import generate_prior

    @ray_session.remote(num_cpus=0)
    class Listener:
        def __init__(self) -> None:
            self.heard: list[tuple[str, int, int]] = []

        def report_prior(self, digest: str, num_done: int, num_images: int) -> None:
            self.heard.append((digest, num_done, num_images))

        def all(self) -> list[tuple[str, int, int]]:
            return self.heard

    listener = Listener.remote()  # type: ignore[attr-defined]
    shared = dataclasses.replace(task, num_workers=3)
    twins = [generate_prior.remote(shared, listener), generate_prior.remote(shared)]
    reports = ray_session.get(twins)
    assert sorted(report.num_generated for report in reports) == [0, 6]
    heard = ray_session.get(listener.all.remote())
    while not heard or heard[-1] != (task.key.digest, 6, 6):  # sent, not waited for
        time.sleep(0.05)
        heard = ray_session.get(listener.all.remote())
    local = PriorCache(tmp_path / "local")
    build_prior(tiny_base, local, task.key, 6, max_rows=2)
    one, other = PriorCache(task.cache_root).load(task.key, 6), local.load(task.key, 6)
    assert torch.allclose(one.mean_NCHW, other.mean_NCHW, atol=0.05)
    assert torch.equal(
        one.conditioning["encoder_hidden_states"], other.conditioning["encoder_hidden_states"]
    )
    grown = ray_session.get(generate_prior.remote(dataclasses.replace(task, num_images=7)))
    assert (grown.num_cached, grown.num_generated) == (6, 1)


def test_errors_of_workers_arrive_as_ours(ray_session: Any, task: Any, tmp_path: Path) -> None:
    from raybooth.data.prior_cluster import generate_prior

    gone = dataclasses.replace(task, base=str(tmp_path / "gone"))
    with pytest.raises(BaseModelError, match="no base is called"):
        ray_session.get(generate_prior.remote(gone))
    other = dataclasses.replace(task.key, base_fingerprint="0" * 64)
    with pytest.raises(PriorError, match="its base is 0000"):
        ray_session.get(generate_prior.remote(dataclasses.replace(task, key=other)))
    assert ray_session.get(generate_prior.remote(task)).num_generated == 6


def test_a_killed_worker_is_followed_by_another(ray_session: Any, task: Any) -> None:
    """SIGKILL to the process that samples: Ray starts its task again, what is whole stays."""
    from raybooth.data.prior_cluster import generate_prior

    key = dataclasses.replace(task.key, num_inference_steps=10)
    many = dataclasses.replace(task, key=key, num_images=60, max_rows=1)
    reference = generate_prior.remote(many)
    cache = PriorCache(task.cache_root)
    while cache.status(key).num_whole < 4:
        time.sleep(0.02)
    killed = _kill_samplers()
    report = ray_session.get(reference)
    assert killed >= 1
    assert report.num_generated == 60
    assert cache.status(key).num_damaged == 0
    assert len(cache.load(key, 60).mean_NCHW) == 60


def _kill_samplers() -> int:
    """Kills the sampling workers of this test's own Ray (their title says so) and counts them."""
    killed = 0
    for folder in Path("/proc").iterdir():
        pid = folder.name
        if pid.isdigit() and _title(pid).startswith("ray::_sample") and _is_ours(int(pid)):
            os.kill(int(pid), signal.SIGKILL)
            killed += 1
    return killed


def _title(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def _is_ours(pid: int) -> bool:
    """Whether the process descends from this one."""
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False
