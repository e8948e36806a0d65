"""One request on its way through the engine: its order, its receipts, what its reader is told."""

from __future__ import annotations

import base64
import hashlib
import time
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from raybooth.model.base import Base, token_split
from raybooth.model.sampler import SampleRequest
from raybooth_serving.access.safety import SafetyChecker
from raybooth_serving.engine.orders import Event, Finished, GeneratedImage, Part, Partial
from raybooth_serving.pictures.files import Format, encode
from raybooth_serving.pictures.receipt import (
    EngineFingerprint,
    Receipt,
    UsedAdapter,
    UsedBase,
    hash_prompts,
)
from raybooth_serving.wire.api import (
    CompletedEvent,
    ImageData,
    ImagesRequest,
    InputTokens,
    Note,
    PartialImageEvent,
    Usage,
)


@dataclass
class Drawing:
    """The images of one request; `encode` and `encode_partial` are called on other threads."""

    base: Base
    used: UsedBase
    fingerprint: EngineFingerprint
    request: ImagesRequest
    samples: tuple[SampleRequest, ...]
    parts: tuple[Part, ...]
    keep_prompt: bool
    checker: SafetyChecker | None
    flagged: set[int] = field(default_factory=set)
    receipts: dict[int, Receipt] = field(default_factory=dict)

    @property
    def format(self) -> Format:
        """Of the picture files."""
        return self.request.output_format

    @property
    def compression(self) -> int:
        """Quality of WebP and JPEG."""
        return self.request.output_compression

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT."""
        return f"{self.samples[0].width}x{self.samples[0].height}"

    def encode(self, image: Image.Image, finished: Finished) -> bytes:
        """The file of a finished image, its receipt inside."""
        if self.checker is not None:
            image, is_flagged = self.checker.finished(image)
            if is_flagged:
                self.flagged.add(finished.index)
        receipt = self._receipt(image, finished)
        self.receipts[finished.index] = receipt
        inside = receipt if self.keep_prompt else receipt.without_prompts()
        return encode(image, self.format, self.compression, inside)

    def encode_partial(self, image: Image.Image) -> bytes:
        """The file of a preview."""
        if self.checker is not None:
            image = self.checker.partial(image)
        return encode(image, self.format, self.compression, None)

    def data(self, image: GeneratedImage) -> ImageData:
        """A finished image in an answer."""
        text = _base64(image.picture)
        index = image.finished.index
        shown: dict[str, Any] = {
            "seed": image.finished.seed,
            "flagged": index in self.flagged or None,
            "receipt": self.receipts[index],
        }
        if self.request.response_format == "url":
            return ImageData(url=f"data:image/{self.format};base64,{text}", **shown)
        return ImageData(b64_json=text, **shown)

    def usage(self, num_images: int = 1) -> Usage:
        """Tokens of both prompts, and latent positions of the images."""
        sample = self.samples[0]
        assert sample.width is not None
        assert sample.height is not None
        prompts = (sample.prompt, sample.negative_prompt)
        text_tokens = sum(len(token_split(self.base.tokenizer, prompt)) for prompt in prompts)
        image_tokens = num_images * sample.width * sample.height // self.base.vae_scale_factor**2
        return Usage(
            input_tokens=text_tokens,
            output_tokens=image_tokens,
            total_tokens=text_tokens + image_tokens,
            input_tokens_details=InputTokens(text_tokens=text_tokens),
        )

    def completed(self, picture: bytes, finished: Finished) -> CompletedEvent:
        """The event of a finished image."""
        return CompletedEvent(
            b64_json=_base64(picture),
            created_at=int(time.time()),
            size=self.size,
            output_format=self.format,
            usage=self.usage(),
            seed=finished.seed,
            flagged=finished.index in self.flagged or None,
            receipt=self.receipts[finished.index],
            image_index=finished.index,
        )

    def told(self, event: Event) -> PartialImageEvent | Note:
        """What the reader of a stream sees of the engine's event."""
        if isinstance(event, Partial):
            return PartialImageEvent(
                b64_json=_base64(event.picture),
                created_at=int(time.time()),
                size=self.size,
                output_format=self.format,
                partial_image_index=event.partial_index,
                image_index=event.index,
            )
        which = f"image {event.index + 1} " if len(self.samples) > 1 else ""
        return Note(text=f"{which}step {event.step}/{event.num_steps}")

    def _receipt(self, image: Image.Image, finished: Finished) -> Receipt:
        sample = self.samples[finished.index]
        assert sample.width is not None
        assert sample.height is not None
        return Receipt(
            prompt=sample.prompt,
            negative_prompt=sample.negative_prompt,
            prompts_sha256=hash_prompts(sample.prompt, sample.negative_prompt),
            seed=sample.seed,
            num_inference_steps=sample.num_inference_steps,
            guidance_scale=sample.guidance_scale,
            solver=sample.solver,
            width=sample.width,
            height=sample.height,
            adapter_scale=sample.adapter_scale,
            zero_terminal_snr=sample.zero_terminal_snr
            or any(part.record.zero_terminal_snr for part in self.parts),
            adapters=tuple(map(_used, self.parts)),
            base=self.used,
            buckets=finished.buckets,
            output_format=self.format,
            output_compression=self.compression,
            pixels_sha256=hash_pixels(image),
            engine=self.fingerprint,
        )


def hash_pixels(image: Image.Image) -> str:
    """SHA-256 of the RGB levels."""
    return hashlib.sha256(image.tobytes()).hexdigest()


def _used(part: Part) -> UsedAdapter:
    record = part.record
    files = {name: file.sha256 for name, file in sorted(record.files.items())}
    return UsedAdapter(reference=record.reference, sha256=files, scale=part.scale)


def _base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode("ascii")
