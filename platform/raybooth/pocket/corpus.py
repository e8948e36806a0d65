"""The training pictures on disk: drawn once from consecutive seeds, with their captions.

N pictures, H = W = 64, C = 3.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raybooth.pocket import world

Pixels = npt.NDArray[np.uint8]

_CHUNK = 256


@dataclass(frozen=True)
class CorpusConfig:
    """How many pictures to draw, from which seed on."""

    data_seed: int = 1_000_000
    pictures: int = 80_000
    clutter: int = 6_000
    workers: int = 2


def build_corpus(config: CorpusConfig, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Draws `pictures_NHWC.npy`, `clutter_NHWC.npy` and `captions.json`, whole or not at all.

    The same config draws the same bytes.
    """
    if (folder / "captions.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    seeds = range(config.data_seed, config.data_seed + config.pictures)
    chunks = [list(seeds[i : i + _CHUNK]) for i in range(0, len(seeds), _CHUNK)]
    captions: list[str] = []
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        pictures_NHWC = _array(folder / "pictures_NHWC.partial", config.pictures)
        for drawn, words in pool.map(_draw_chunk, chunks):
            pictures_NHWC[len(captions) : len(captions) + len(drawn)] = drawn
            captions += words
            progress(len(captions), config.pictures)
        clutter_NHWC = _array(folder / "clutter_NHWC.partial", config.clutter)
        for i, drawn in enumerate(pool.map(_draw_clutter, range(config.clutter), chunksize=_CHUNK)):
            clutter_NHWC[i] = drawn
    pictures_NHWC.flush()
    clutter_NHWC.flush()
    for name in ("pictures_NHWC", "clutter_NHWC"):
        os.replace(folder / f"{name}.partial", folder / f"{name}.npy")
    (folder / "captions.partial").write_text(json.dumps(captions))
    os.replace(folder / "captions.partial", folder / "captions.json")


def pixels(image: Any) -> Pixels:
    """The [H, W, C] bytes of a picture."""
    return np.asarray(image, dtype=np.uint8)


def _array(path: Path, n: int) -> Any:
    shape = (n, world.SIZE, world.SIZE, 3)
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)


def _draw_chunk(seeds: list[int]) -> tuple[Pixels, list[str]]:
    drawn = [world.example(seed) for seed in seeds]
    return np.stack([pixels(image) for image, _, _, _ in drawn]), [
        words for _, words, _, _ in drawn
    ]


def _draw_clutter(seed: int) -> Pixels:
    return pixels(world.clutter(seed))
