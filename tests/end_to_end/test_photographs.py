"""Real photographs, as users bring them, run to published models on the pocket base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


def test_three_dreambench_subjects_are_published(shared_data: Path, tmp_path: Path) -> None:
    photos = shared_data / "dreambench"
    subjects = [
        {"id": name.replace("_", "-"), "class_noun": noun, "images": str(photos / name)}
        for name, noun in (("dog6", "dog"), ("colorful_sneaker", "sneaker"), ("teapot", "teapot"))
    ]
    train = {
        "resolution": 64,
        "num_train_steps": 4,
        "adapter": {"rank": 4, "targets": "all"},
        "prior": {"num_images": 2, "num_inference_steps": 3, "guidance_scale": 3.0},
        "samples": {"num_inference_steps": 3},
    }
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(json.dumps({"base": "pocket", "train": train, "subjects": subjects}))
    environment = {**os.environ, "RAYBOOTH_HOME": str(tmp_path / "state")}
    command = [sys.executable, "-m", "raybooth.cli"]
    done = subprocess.run(
        [*command, "train", str(fleet)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    listed = subprocess.run(
        [*command, "models", "--json"], env=environment, capture_output=True, check=True
    )
    models = json.loads(listed.stdout)
    assert [model["subject_id"] for model in models] == ["colorful-sneaker", "dog6", "teapot"]
    for model in models:
        record = json.loads((Path(model["folder"]) / "record.json").read_text())
        assert len(record["photos"]) == 5
        losses = [loss for _, loss in record["loss_curve"]]
        assert all(0 < loss < 10 for loss in losses)
