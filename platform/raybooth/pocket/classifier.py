"""A small convolutional judge of pocket pictures: which class, which context, which main colour.

It is trained on true renders only, blurred and noised a little; it never sees a sample.
B batch, H = W = 64.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from raybooth.pocket import world
from raybooth.pocket.corpus import pixels
from raybooth.pocket.loop import numbers
from raybooth.pocket.palette import COLORS
from raybooth.pocket.vae import as_tensor

HEADS = {"class": len(world.CLASSES), "context": len(world.CONTEXTS), "colour": len(COLORS)}
_TRAIN_SEED, _TEST_SEED = 55_000_000, 56_000_000


class Classifier(nn.Module):
    """Three logits rows for a picture in [-1, 1]: class, context, colour."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 40, 64, 96)
        layers: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            layers += [
                nn.Conv2d(inner, outer, 3, stride=2, padding=1),
                nn.GroupNorm(8, outer),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers, nn.Conv2d(96, 64, 1), nn.SiLU(), nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(64 * 16, n) for name, n in HEADS.items()})

    def forward(self, pictures_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits [B, n] for each head."""
        features = self.body(pictures_BCHW)
        return {name: head(features) for name, head in self.heads.items()}


def labels(instance: world.Instance, context: str) -> dict[str, int]:
    """The true index for each head."""
    return {
        "class": world.CLASSES.index(instance.class_noun),
        "context": list(world.CONTEXTS).index(context),
        "colour": list(COLORS).index(instance.a),
    }


def train_classifier(
    pictures: int, steps: int, seed: int, progress: Callable[[int, float], None]
) -> Classifier:
    """A classifier trained with AdamW on renders of its own seeds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier()
    images_BCHW, truth = renders(pictures, _TRAIN_SEED)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        rng = numbers(seed, "judge", step)
        rows_B = torch.randint(0, pictures, (64,), generator=rng)
        logits = classifier(softened(images_BCHW[rows_B], rng))
        loss = torch.stack(
            [functional.cross_entropy(logits[name], truth[name][rows_B]) for name in HEADS]
        ).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(step + 1, loss.item())
    return classifier.eval()


def renders(n: int, first_seed: int = _TEST_SEED) -> tuple[Tensor, dict[str, Tensor]]:
    """n true renders [n, 3, H, W] and their labels; the default seeds are held out."""
    images, truth = [], []
    for seed in range(first_seed, first_seed + n):
        image, _, instance, context = world.example(seed)
        images.append(pixels(image))
        truth.append(labels(instance, context))
    return as_tensor(np.stack(images)), {
        name: torch.tensor([one[name] for one in truth]) for name in HEADS
    }


@torch.no_grad()
def accuracy(
    classifier: Classifier, pictures_BCHW: Tensor, truth: dict[str, Tensor]
) -> dict[str, float]:
    """The share of pictures whose class, context and colour are named as in `truth`."""
    logits = classifier(pictures_BCHW)
    return {
        name: round(float((logits[name].argmax(1) == truth[name]).float().mean()), 4)
        for name in HEADS
    }


def save_classifier(classifier: Classifier, path: Path) -> None:
    """Writes float16 safetensors."""
    save_file({key: t.half().contiguous() for key, t in classifier.state_dict().items()}, path)


def load_classifier(path: Path) -> Classifier:
    """The classifier of `save_classifier`, in float32."""
    classifier = Classifier()
    state: dict[str, Any] = load_file(path)
    classifier.load_state_dict({key: t.float() for key, t in state.items()})
    return classifier.eval()


def softened(pictures_BCHW: Tensor, rng: torch.Generator) -> Tensor:
    """Some blur and some noise: a judge of shapes and colours, not of pixel-exact edges."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel_2d = (kernel[:, None] * kernel[None, :] / 16).expand(3, 1, 3, 3)
    blurred = functional.conv2d(
        functional.pad(pictures_BCHW, (1, 1, 1, 1), mode="replicate"), kernel_2d, groups=3
    )
    share = torch.rand(len(pictures_BCHW), 1, 1, 1, generator=rng)
    noise = (
        torch.randn(pictures_BCHW.shape, generator=rng)
        * 0.1
        * torch.rand(len(pictures_BCHW), 1, 1, 1, generator=rng)
    )
    return pictures_BCHW * (1 - share) + blurred * share + noise
