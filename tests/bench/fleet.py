"""A whole fleet of eight against eight separate diffusers + PEFT programs, start-up included."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raybooth.config import TrainConfig, find_config, load_config
from raybooth.pocket import path as pocket_path
from raybooth.pocket import world
from tests.bench.rounds import BenchReport, Contender, measure

CLASSES = ("robot", "robot", "robot", "fish", "fish", "house", "car", "rocket")
STEPS = 100


def run(rounds: int) -> list[BenchReport]:
    """Both sides may use every core: two workers of ours, two of their programs at a time."""
    train = load_config(TrainConfig, find_config("train", "pocket-lora"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subjects = [_photos(folder, index, noun) for index, noun in enumerate(CLASSES)]
        fleet = folder / "fleet.yaml"
        overrides = {"num_train_steps": STEPS, "samples": {"prompts": []}}
        defaults = {"overrides": overrides}
        whole = {"train": "pocket-lora", "defaults": defaults, "subjects": subjects}
        fleet.write_text(json.dumps(whole))
        contenders = [
            Contender("8 diffusers + PEFT programs", lambda: _separate(folder, train), 8),
            Contender("raybooth train, a fleet of 8", lambda: _fleet(folder, fleet), 8),
        ]
        title = f"Fleet: subjects/s from photos to saved adapters, {STEPS} train steps each"
        notes = [
            f"Classes: {', '.join(CLASSES)}; {train.prior.num_images} prior images a class.",
            "Separate programs draw their own prior images; both sides include process start.",
        ]
        command = "python -m tests.bench fleet"
        reference = contenders[0].name
        count = max(1, rounds // 5)  # whole programs: long, and cold by design
        report = measure(
            title, "subjects/s", contenders, reference, count, command, notes, warm_up=False
        )
        return [report]


def _photos(folder: Path, index: int, class_noun: str) -> dict[str, str]:
    subject_id = f"{class_noun}-{index}"
    photos = folder / "photos" / subject_id
    photos.mkdir(parents=True)
    instance = world.draw_instance(100 + index, class_noun, fancy=True)
    for place, photo in enumerate(world.subject_photos(instance, 5, index)):
        photo.save(photos / f"{place}.png")
    return {"id": subject_id, "class_noun": class_noun, "images": f"photos/{subject_id}"}


def _separate(folder: Path, train: TrainConfig) -> None:
    out = folder / "separate"
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def program(photos: Path) -> None:
        command = [sys.executable, "-m", "tests.bench.peft_run", "--base", str(pocket_path())]
        command += ["--photos", str(photos), "--class-noun", photos.name.split("-")[0]]
        command += ["--out", str(out / photos.name), "--steps", str(STEPS)]
        command += ["--rank", str(train.adapter.rank), "--rows", str(train.batch_size)]
        command += ["--prior-images", str(train.prior.num_images)]
        command += ["--prior-steps", str(train.prior.num_inference_steps)]
        subprocess.run(command, env=environment, check=True, capture_output=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(program, sorted((folder / "photos").iterdir())))


def _fleet(folder: Path, fleet: Path) -> None:
    home = folder / "home"
    shutil.rmtree(home, ignore_errors=True)
    environment = {**os.environ, "RAYBOOTH_HOME": str(home)}
    command = [sys.executable, "-m", "raybooth.cli", "train", str(fleet)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
