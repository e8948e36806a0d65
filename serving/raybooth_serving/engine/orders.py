"""What the engine is asked for, and what it tells: an order of images, its events, its pictures."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from raybooth.model.sampler import SampleRequest
from raybooth.store import AdapterRecord

MAX_PARTIAL_IMAGES = 3


@dataclass(frozen=True, slots=True)
class Part:
    """One subject of an order and how strongly."""

    record: AdapterRecord
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Finished:
    """What is known of a finished image."""

    index: int
    """Which image of the order."""

    seed: int
    adapter: str | None
    """Name and content of the adapter in the slot; None: the plain base."""

    buckets: tuple[tuple[int, int], ...]
    """The bucket trace: (bucket, denoise steps in it) in the order they were done."""


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A finished image as `Order.encode` made it."""

    picture: bytes
    finished: Finished


@dataclass(frozen=True, slots=True)
class Progress:
    """An image of the order has done `step` of `num_steps` denoise steps."""

    index: int
    step: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Partial:
    """What an image of the order looks like so far: its x0 prediction, decoded and encoded."""

    index: int
    partial_index: int
    picture: bytes


Event = Progress | Partial


def png(image: Image.Image, finished: Finished) -> bytes:
    """PNG without a word about how it was made."""
    return png_partial(image)


def png_partial(image: Image.Image) -> bytes:
    """PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True, slots=True)
class Order:
    """Images that are asked for together: same subjects, same tenant, same deadline."""

    samples: tuple[SampleRequest, ...]
    parts: tuple[Part, ...] = ()
    """None: the plain base. One: its scale is the row's. Several: all of them in each image."""

    tenant: str = ""
    """Whose share of the engine this is: the id of an API key."""

    deadline: float | None = None
    """Of time.monotonic(): refused if it cannot be met, dropped at the next step once past."""

    bucket: int | None = None
    """Every denoise step runs in exactly this bucket (same bytes on every run)."""

    partial_images: int = 0
    """Of each image, 0 to MAX_PARTIAL_IMAGES, evenly spaced over its denoise steps."""

    encode: Callable[[Image.Image, Finished], bytes] = png
    """On a thread of its own; a RayBoothError of it fails the order."""

    encode_partial: Callable[[Image.Image], bytes] = png_partial
    on_event: Callable[[Event], None] | None = None
    """On the thread of the event loop; must not block."""
