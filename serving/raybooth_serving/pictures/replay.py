"""Draw an image again from its receipt: alone, in the buckets that it was drawn in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel

from raybooth.config import EngineConfig
from raybooth.errors import BaseModelError, InputError, StoreError
from raybooth.model.base import Base, load_base
from raybooth.model.published import take_on
from raybooth.model.sampler import SampleRequest, denoise_step, row_image, start_row
from raybooth.store import AdapterRecord, FullRecord, Store
from raybooth_serving.engine.loop import Engine
from raybooth_serving.engine.orders import Part
from raybooth_serving.pictures.drawing import hash_pixels
from raybooth_serving.pictures.files import encode, open_picture
from raybooth_serving.pictures.fingerprint import DTYPES, fingerprint_full
from raybooth_serving.pictures.receipt import EngineFingerprint, Receipt, UsedAdapter, hash_prompts


class ReplayReport(BaseModel):
    """Whether the image came out again."""

    equal: bool
    """Every RGB level, before any compression."""

    max_level_difference: int | None
    """0 to 255, to the picture that was given; None: only a receipt was."""

    engine_differences: dict[str, tuple[str, str]]
    """By part of the engine's fingerprint: (of the receipt, here)."""

    def sentence(self) -> str:
        """What a person wants to know."""
        if self.equal:
            return "the same image, bit for bit"
        text = "another image"
        if self.max_level_difference is not None:
            text += f", by at most {self.max_level_difference} of 255 levels"
        parts = [
            f"{name} was {then}, is {now}" for name, (then, now) in self.engine_differences.items()
        ]
        return f"{text}: {'; '.join(parts) or 'though the engine has the same fingerprint'}"


def load_base_of(receipt: Receipt, store: Store, source: str | None) -> Base:
    """The base of `receipt` (from `source` if given), with the weights of its full fine-tune.

    Raises BaseModelError when there is none, NotPublishedError for a fine-tune that is gone.
    """
    record = store.fetch(receipt.base.name) if "@" in receipt.base.name else None
    full = record if isinstance(record, FullRecord) else None
    origin = receipt.base if full is None else full.base
    base = load_base(
        source or origin.name,
        revision=None if source else origin.revision,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=DTYPES[receipt.engine.dtype],
    )
    if full is None:
        return base
    take_on(base, full, store.folder(full.reference))
    return replace(base, fingerprint=fingerprint_full(base.fingerprint, full))


def redraw(base: Base, store: Store, receipt: Receipt) -> Image.Image:
    """The image of `receipt`.

    Raises BaseModelError for another base, NotPublishedError or StoreError when an adapter is gone
    or has changed, InputError for a receipt that keeps no prompts.
    """
    if receipt.prompt is None or receipt.negative_prompt is None:
        do = "give the `receipt` of the answer as JSON: it has them"
        raise InputError("this picture keeps no prompts, so it cannot be drawn again", "", do)
    if hash_prompts(receipt.prompt, receipt.negative_prompt) != receipt.prompts_sha256:
        raise InputError("the prompts of this receipt have been changed", "another SHA-256")
    if receipt.base.fingerprint != base.fingerprint:
        found = f"{base.name} {base.fingerprint[:12]}"
        do = f"name {receipt.base.name} {receipt.base.fingerprint[:12]} with --base"
        raise BaseModelError("the image was drawn with another base", found, do)
    parts = tuple(_part(store, used) for used in receipt.adapters)
    config = EngineConfig(num_slots=1, max_rank=receipt.engine.rank, targets=receipt.engine.targets)
    engine = Engine(base, store, config)
    try:
        adapter = engine.loader.load(parts) if parts else None
        scale = parts[0].scale if len(parts) == 1 else 1.0
        if adapter is not None:
            engine.bank.write(1, adapter.tensors)
        request = SampleRequest(
            prompt=receipt.prompt,
            negative_prompt=receipt.negative_prompt,
            seed=receipt.seed,
            num_inference_steps=receipt.num_inference_steps,
            guidance_scale=receipt.guidance_scale,
            solver=receipt.solver,
            width=receipt.width,
            height=receipt.height,
            slot=0 if adapter is None else 1,
            adapter_scale=receipt.adapter_scale * scale,
            zero_terminal_snr=receipt.zero_terminal_snr,
        )
        cond, uncond = (
            engine.prompts.encode(prompt, adapter, request.adapter_scale)
            for prompt in (request.prompt, request.negative_prompt)
        )
        row = start_row(base, request, cond=cond, uncond=uncond)
        for bucket, num_steps in receipt.buckets:
            for _ in range(num_steps):
                denoise_step(base, engine.bank, [row], bucket)
    finally:
        engine.bank.detach()
    return row_image(base, row)


def compare(
    image: Image.Image, receipt: Receipt, here: EngineFingerprint, picture: bytes | None
) -> ReplayReport:
    """`image`, drawn again, held against its receipt and the `picture` file if there is one."""
    difference = None
    if picture is not None:
        again = encode(image, receipt.output_format, receipt.output_compression, None)
        then, now = (np.asarray(open_picture(file), np.int16) for file in (picture, again))
        if then.shape != now.shape:
            found = f"{then.shape[1]}x{then.shape[0]}, not {now.shape[1]}x{now.shape[0]}"
            raise InputError("the picture has been given another size", found)
        difference = int(np.abs(then - now).max())
    return ReplayReport(
        equal=hash_pixels(image) == receipt.pixels_sha256,
        max_level_difference=difference,
        engine_differences=receipt.engine.differences(here),
    )


def _part(store: Store, used: UsedAdapter) -> Part:
    record = store.fetch(used.reference)
    if not isinstance(record, AdapterRecord):
        raise BaseModelError(f"{used.reference} is no adapter")
    here = {name: file.sha256 for name, file in record.files.items()}
    if here != used.sha256:
        do = "the store has another adapter under this version; bring the old one back"
        raise StoreError(f"{used.reference} is not what the image was drawn with", "", do)
    return Part(record, used.scale)
