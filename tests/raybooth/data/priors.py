"""Priors for tests of the cache: small pictures that are a function of the key's seeds (no torch).

Run as a program it is one more process that wants a prior:
`python priors.py ROOT LOG NUM_IMAGES [KILL_AT] [PAUSE_S]`.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save

from raybooth.data.generated import Generated, GeneratedPrior, GeneratedPrompt
from raybooth.data.prior import PriorCache, PriorKey, image_seed

KEY = PriorKey(
    base_fingerprint="ab" * 32,
    class_prompt="a photo of a dog",
    negative_prompt="",
    solver="ddim",
    num_inference_steps=25,
    guidance_scale=3.0,
    resolution=16,
    dtype="float32",
    generator_version=1,
)


class Generator:
    """Makes priors and remembers which; dies or fails at an image if told to."""

    def __init__(
        self,
        key: PriorKey = KEY,
        *,
        log: Path | None = None,
        kill_at: int | None = None,
        fail_at: int | None = None,
        pause_s: float = 0.0,
        image_size: int = 16,
        latent_size: int = 2,
    ) -> None:
        self.key, self.log, self.kill_at, self.fail_at = key, log, kill_at, fail_at
        self.pause_s, self.image_size, self.latent_size = pause_s, image_size, latent_size
        self.made: list[int] = []

    def __call__(self, indices: Sequence[int]) -> Iterator[Generated]:
        yield GeneratedPrompt(save({"encoder_hidden_states": np.full((1, 3, 2), 0.5, np.float32)}))
        for index in indices:
            if index == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if index == self.fail_at:
                raise RuntimeError("the sampler broke")
            time.sleep(self.pause_s)
            if self.log is not None:
                with self.log.open("a") as file:
                    file.write(f"{index}\n")
            self.made.append(index)
            yield prior_image(self.key, index, self.image_size, self.latent_size)


def prior_image(key: PriorKey, index: int, size: int = 16, latent_size: int = 2) -> GeneratedPrior:
    """What the sampler would make."""
    rng = np.random.default_rng(image_seed(key, index))
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
    mean_CHW = rng.standard_normal((4, latent_size, latent_size), dtype=np.float32)
    latents = save({"mean": mean_CHW, "std": abs(mean_CHW)})
    return GeneratedPrior(index, file.getvalue(), latents)


def main() -> None:
    root, log, num_images = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    kill_at = int(sys.argv[4]) if len(sys.argv) > 4 else None
    pause_s = float(sys.argv[5]) if len(sys.argv) > 5 else 0.0
    generator = Generator(log=log, kill_at=kill_at, pause_s=pause_s)
    report = PriorCache(root).ensure(KEY, num_images, generator)
    print(report.num_cached, report.num_generated, report.num_damaged)


if __name__ == "__main__":
    main()
