"""`make demo`: six drawn subjects from photos to served pictures, on one contact sheet.

Everything goes through what users have: `raybooth train` on a fleet file, `raybooth serve`, and
HTTP requests of many subjects at once. Writes demo/contact_sheet.png and demo/summary.json.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from raybooth.pocket import world
from tests.end_to_end.sheet import SheetRow, draw_sheet

CONTEXTS = ("on the beach", "in the snow", "in the jungle", "at night")
IDENTIFIER = "sks"
NUM_PHOTOS = 5
LEAK = "no-prior"


@dataclass(frozen=True, slots=True)
class Cast:
    """One subject of the demo."""

    subject_id: str
    class_noun: str
    draw_seed: int


CAST = (
    Cast("bolt", "robot", 3),
    Cast("gizmo", "robot", 11),
    Cast("finn", "fish", 5),
    Cast("nest", "house", 8),
    Cast("zip", "car", 21),
    Cast("apollo", "rocket", 13),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--train-steps", type=int, help="instead of configs/train/pocket-lora's")
    options = parser.parse_args()
    out: Path = options.out.absolute()
    shutil.rmtree(out / "home", ignore_errors=True)  # each demo starts from nothing, to be timed
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "RAYBOOTH_HOME": str(out / "home")}
    console = Console()
    seconds: dict[str, float] = {}

    with _phase("draw six subjects", seconds, console):
        fleet = _write_fleet(out, options.train_steps)
    with _phase("train and publish", seconds, console):
        _raybooth(["train", str(fleet)], environment)
    serving = _endpoint(environment, out / "serve.log")
    with _phase("serve and sample", seconds, console), serving as url:
        pictures = _request_all(url)
    with _phase("draw the sheet", seconds, console):
        _sheet(out, pictures).save(out / "contact_sheet.png")
    summary = _summary(environment, seconds, len(pictures))
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _print_summary(summary, console)
    console.print(f"\nOpen [bold]{out / 'contact_sheet.png'}[/bold]")
    return 0


def _write_fleet(out: Path, train_steps: int | None) -> Path:
    """Photos of each subject, and a fleet file that trains one of them without a prior too."""
    subjects: list[dict[str, Any]] = []
    for cast in CAST:
        folder = out / "photos" / cast.subject_id
        folder.mkdir(parents=True, exist_ok=True)
        for index, photo in enumerate(_photos(cast)):
            photo.save(folder / f"{index}.png")
        images = f"photos/{cast.subject_id}"
        subjects.append({"id": cast.subject_id, "class_noun": cast.class_noun, "images": images})
    without = {"prior": {"num_images": 0, "loss_weight": 0.0}}
    subjects.append({**subjects[0], "id": LEAK, "overrides": without})
    fleet = {
        "base": "pocket",
        "train": "pocket-lora",
        "defaults": {
            "identifier": IDENTIFIER,
            "overrides": {} if train_steps is None else {"num_train_steps": train_steps},
        },
        "subjects": subjects,
    }
    path = out / "fleet.yaml"
    path.write_text(json.dumps(fleet, indent=2) + "\n")  # JSON is YAML
    return path


def _photos(cast: Cast) -> list[Image.Image]:
    instance = world.draw_instance(cast.draw_seed, cast.class_noun, fancy=True)
    return world.subject_photos(instance, NUM_PHOTOS, cast.draw_seed)


def _raybooth(words: Sequence[str], environment: dict[str, str]) -> None:
    code = subprocess.call([sys.executable, "-m", "raybooth.cli", *words], env=environment)
    if code != 0:
        raise SystemExit(code)


@contextmanager
def _endpoint(environment: dict[str, str], log: Path) -> Iterator[str]:
    """`raybooth serve` on a free loopback port for the time of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    words = [sys.executable, "-m", "raybooth.cli", "serve", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            _wait_until_healthy(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"`raybooth serve` ended early:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"`raybooth serve` was not ready in 180 s:\n{log.read_text()[-2000:]}")


Wish = tuple[str, str, int]
"""(model, prompt, seed)."""


def _wishes() -> list[Wish]:
    wishes: list[Wish] = []
    for cast in CAST:
        for seed, context in enumerate(CONTEXTS):
            prompt = f"a photo of {IDENTIFIER} {cast.class_noun} {context}"
            wishes.append((cast.subject_id, prompt, seed))
        wishes.append(("pocket", f"a photo of a {cast.class_noun}", 7))
    for model in ("pocket", CAST[0].subject_id, LEAK):
        wishes += [(model, f"a photo of a {CAST[0].class_noun}", seed) for seed in range(20, 25)]
    return wishes


def _request_all(url: str) -> dict[Wish, Image.Image]:
    """Every wish at once, over HTTP: subjects, prompts and seeds share the engine's batches."""
    wishes = list(dict.fromkeys(_wishes()))
    with ThreadPoolExecutor(len(wishes)) as pool:
        return dict(zip(wishes, pool.map(lambda wish: _request(url, wish), wishes), strict=True))


def _request(url: str, wish: Wish) -> Image.Image:
    model, prompt, seed = wish
    body = {"model": model, "prompt": prompt, "seed": seed, "guidance_scale": 3.0}
    request = urllib.request.Request(
        f"{url}/v1/images/generations",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        encoded = json.load(answer)["data"][0]["b64_json"]
    return Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")


def _sheet(out: Path, pictures: dict[Wish, Image.Image]) -> Image.Image:
    subjects = []
    for cast in CAST:
        cells = [
            (
                context,
                pictures[
                    cast.subject_id, f"a photo of {IDENTIFIER} {cast.class_noun} {context}", seed
                ],
            )
            for seed, context in enumerate(CONTEXTS)
        ]
        plain = f"a photo of a {cast.class_noun}"
        cells.append((f"the base: a {cast.class_noun}", pictures["pocket", plain, 7]))
        title = f"{cast.subject_id}: a photo of {IDENTIFIER} {cast.class_noun} ..."
        subjects.append(SheetRow(title, _photos(cast), cells))
    first = CAST[0]
    plain = f"a photo of a {first.class_noun}"
    leak = []
    for model, title in (
        ("pocket", "the base"),
        (
            first.subject_id,
            f"{first.subject_id}, trained with the prior: a {first.class_noun} is any of them",
        ),
        (LEAK, f"trained without it: every {first.class_noun} turns into {first.subject_id}"),
    ):
        cells = [(f"seed {seed}", pictures[model, plain, seed]) for seed in range(20, 25)]
        leak.append(SheetRow(title, _photos(first), cells))
    return draw_sheet(
        "RayBooth: six subjects, two packs, one batch",
        "left: what each subject was learned from; right: new pictures from one endpoint",
        [
            ("New contexts for each subject, and what the base draws for its class", subjects),
            (f'Why the prior: "{plain}", without the identifier', leak),
        ],
    )


def _summary(
    environment: dict[str, str], seconds: dict[str, float], num_pictures: int
) -> dict[str, Any]:
    models = _json(["models", "--json"], environment)
    priors = _json(["prior", "ls", "--json"], environment)
    steps = sum(model["num_train_steps"] for model in models)
    training = seconds["train and publish"]
    return {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "subjects": len(models),
        "train_steps": steps,
        "subject_steps_per_s": round(steps / training, 1),
        "priors_generated": len(priors),
        "prior_cache_hits": len(CAST) - len(priors),
        "images_served": num_pictures,
        "images_per_s": round(num_pictures / seconds["serve and sample"], 2),
    }


def _json(words: Sequence[str], environment: dict[str, str]) -> Any:
    command = [sys.executable, "-m", "raybooth.cli", *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _print_summary(summary: dict[str, Any], console: Console) -> None:
    table = Table("phase", "seconds", title="RayBooth demo")
    for name, value in summary["seconds"].items():
        table.add_row(name, f"{value:.1f}")
    table.add_section()
    table.add_row("subjects published", str(summary["subjects"]))
    table.add_row(
        "priors generated / cache hits",
        f"{summary['priors_generated']} / {summary['prior_cache_hits']}",
    )
    table.add_row("subject-steps/s, start-up included", f"{summary['subject_steps_per_s']:.1f}")
    table.add_row("images served", str(summary["images_served"]))
    console.print(table)


@contextmanager
def _phase(name: str, seconds: dict[str, float], console: Console) -> Iterator[None]:
    console.rule(name)
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
