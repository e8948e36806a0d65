"""How good the base is, in figures: does it draw what the prompt names?"""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raybooth.pocket import world
from raybooth.pocket.classifier import (
    HEADS,
    Classifier,
    accuracy,
    labels,
    load_classifier,
    renders,
    save_classifier,
    train_classifier,
)
from raybooth.pocket.export import load_base
from raybooth.pocket.palette import COLORS
from raybooth.pocket.pretrain import held_out
from raybooth.pocket.progress import stage
from raybooth.pocket.vae import as_tensor, psnr

TARGETS = {"class": 0.90, "context": 0.95, "colour": 0.80, "vae_psnr_db": 30.0}
_CLASSIFIER = "classifier.safetensors"


@dataclass(frozen=True)
class ReportConfig:
    """How many prompts, and how they are sampled."""

    prompts: int = 200
    denoise_steps: int = 25
    guidance: float = 3.0
    seed: int = 0
    device: str = "cpu"
    batch: int = 20
    classifier_pictures: int = 12_000
    classifier_steps: int = 1_500


def write_report(folder: Path, config: ReportConfig) -> dict[str, Any]:
    """Judges the base in `folder`; leaves report.json, samples.png and the judge beside it."""
    classifier = _judge(folder, config)
    true_BCHW, truth = renders(1_000)
    pipeline = load_base(folder, config.device)
    asked = prompts(config.prompts, config.seed)
    pictures: list[Any] = []
    with stage("samples", len(asked)) as tell:
        for i in range(0, len(asked), config.batch):
            part = asked[i : i + config.batch]
            pictures += pipeline(
                [text for text, _ in part],
                num_inference_steps=config.denoise_steps,
                guidance_scale=config.guidance,
                height=world.SIZE,
                width=world.SIZE,
                generator=[
                    torch.Generator().manual_seed(config.seed + i + k) for k in range(len(part))
                ],
            ).images
            tell(len(pictures), "pictures")
    wanted = {name: torch.tensor([label[name] for _, label in asked]) for name in HEADS}
    sampled_BCHW = as_tensor(np.stack([np.asarray(one) for one in pictures]))
    found = {
        **accuracy(classifier, sampled_BCHW, wanted),
        "vae_psnr_db": round(psnr(pipeline.vae, held_out(128)), 2),
    }
    report = {
        "base": found,
        "targets": TARGETS,
        "met": {name: found[name] >= target for name, target in TARGETS.items()},
        "classifier_on_true_renders": accuracy(classifier, true_BCHW, truth),
        "prompts": config.prompts,
        "sampling": {
            "solver": "ddim",
            "denoise_steps": config.denoise_steps,
            "guidance": config.guidance,
            "seed": config.seed,
        },
        "samples_seen": _samples_seen(folder),
    }
    world.sheet(pictures[:100], 10).save(folder / "samples.png", optimize=True)
    beside = folder / "report.json.partial"
    beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, folder / "report.json")
    return report


def prompts(n: int, seed: int) -> list[tuple[str, dict[str, int]]]:
    """n prompts with their labels: every class in every context in turn, the colour drawn."""
    rng = random.Random(f"prompts:{seed}")
    asked = []
    for i in range(n):
        noun, context = world.CLASSES[i % 10], list(world.CONTEXTS)[(i + i // 10) % 10]
        color = rng.choice(list(COLORS))
        instance = world.Instance(
            noun, color, color, color, color, "plain", "none", "none", 0.5, 0.5
        )
        asked.append(
            (f"a photo of a {color} {noun} {world.CONTEXTS[context]}", labels(instance, context))
        )
    return asked


def _judge(folder: Path, config: ReportConfig) -> Classifier:
    path = folder / _CLASSIFIER
    if path.exists():
        return load_classifier(path)
    with stage("classifier", config.classifier_steps) as tell:
        classifier = train_classifier(
            config.classifier_pictures,
            config.classifier_steps,
            config.seed,
            lambda step, loss: tell(step, f"loss {loss:.3f}"),
        )
    save_classifier(classifier, path)
    return load_classifier(path)


def _samples_seen(folder: Path) -> int | None:
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    denoiser = record.get("stages", {}).get("denoiser")
    return None if denoiser is None else int(denoiser["samples_seen"])
