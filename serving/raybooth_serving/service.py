"""One base, its catalog and its engine behind the API's own words; knows neither HTTP nor Ray."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import torch

from raybooth.config import Precision, ServeConfig, ServedBase
from raybooth.config.adapter import countable
from raybooth.model.base import Base, cut_tokens, load_base, token_split
from raybooth.model.sampler import SampleRequest
from raybooth.store import AdapterRecord, Store
from raybooth_serving.api import (
    CompletedEvent,
    ImageData,
    ImagesRequest,
    ImagesResponse,
    InputTokens,
    ModelList,
    ParameterError,
    Usage,
    check_limits,
    parse_size,
)
from raybooth_serving.caller import Caller
from raybooth_serving.catalog import Catalog
from raybooth_serving.engine import Engine
from raybooth_serving.errors import DeadlineError
from raybooth_serving.orders import GeneratedImage, Order, Part
from raybooth_serving.streams import Events, StreamEvent

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class Service:
    """Answers requests from one replica's engine."""

    def __init__(self, base: Base, store: Store, config: ServeConfig, served: ServedBase) -> None:
        self.base = base
        self.config = config
        self.served = served
        self.name = base_name(base)
        self.catalog = Catalog(store, self.name, base.fingerprint)
        self.engine = Engine(base, store, served.engine)

    @classmethod
    def start(cls, config: ServeConfig, served: ServedBase, store: Store) -> Service:
        """Load `served`, one of the bases of `config`, onto the device that there is."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = DTYPES[served.precision]
        base = load_base(served.base, revision=served.revision, device=device, dtype=dtype)
        return cls(base, store, config, served)

    async def generate(self, request: ImagesRequest, caller: Caller) -> ImagesResponse:
        """The images of `request`, or the error that says why not."""
        record, samples = await self._resolve(request, caller)
        images = await self._draw(record, samples, caller)
        return ImagesResponse(
            created=int(time.time()),
            data=[_data(image, request.response_format) for image in images],
            size=f"{samples[0].width}x{samples[0].height}",
            model=self.name if record is None else record.reference,
        )

    async def stream(
        self, request: ImagesRequest, caller: Caller
    ) -> AsyncGenerator[StreamEvent, None]:
        """The events of `request`, the last of each image its completed one."""
        record, samples = await self._resolve(request, caller)
        events = Events()

        async def work() -> None:
            for index, image in enumerate(await self._draw(record, samples, caller)):
                events.put(self._completed(index, image, samples[index]))

        async with aclosing(events.during(work())) as stream:
            async for event in stream:
                yield event

    async def models(self, with_versions: bool, caller: Caller) -> ModelList:
        """What `caller` can ask for now."""
        catalog = self.catalog.seen_by(caller.subjects)
        cards = await asyncio.to_thread(catalog.cards, with_versions=with_versions)
        return ModelList(data=cards)

    async def metrics(self) -> dict[str, float]:
        """The engine's counters."""
        return self.engine.snapshot()

    async def check_health(self) -> None:
        """Raises ServingError when the engine has died."""
        self.engine.check_health()

    async def _resolve(
        self, request: ImagesRequest, caller: Caller
    ) -> tuple[AdapterRecord | None, list[SampleRequest]]:
        check_limits(request, self.config.limits)
        catalog = self.catalog.seen_by(caller.subjects)
        record = await asyncio.to_thread(catalog.resolve, request.model)
        return record, self._samples(request, record)

    async def _draw(
        self, record: AdapterRecord | None, samples: list[SampleRequest], caller: Caller
    ) -> list[GeneratedImage]:
        timeout_s = self.config.limits.timeout_s
        if caller.deadline_s is not None:
            timeout_s = min(timeout_s, caller.deadline_s)
        parts = () if record is None else (Part(record),)
        try:
            async with asyncio.timeout(timeout_s):
                return await self.engine.generate(Order(tuple(samples), parts))
        except TimeoutError as error:
            what, do = "the images took too long", "ask for fewer or smaller images"
            raise DeadlineError(what, f"over {timeout_s:g} s", do) from error

    def _samples(self, request: ImagesRequest, record: AdapterRecord | None) -> list[SampleRequest]:
        """One for each image; raises ParameterError for what the base cannot make."""
        defaults = self.served.defaults
        width, height = parse_size(request.size, self.base.native_resolution)
        self._check_pixels(width, height)
        for name in ("prompt", "negative_prompt"):
            prompt = getattr(request, name)
            if record is not None:
                prompt = countable(prompt, record.identifier, record.identifier_tokens)
            cut = cut_tokens(self.base.tokenizer, prompt)
            if cut:
                found = f"these tokens would be cut: {' '.join(cut[:20])}{' ...' * (len(cut) > 20)}"
                raise ParameterError(name, f"{name} is too long for this base", found, "shorten it")
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        guidance, solver = request.guidance_scale, request.solver
        return [
            SampleRequest(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                seed=seed + index,
                num_inference_steps=request.num_inference_steps or defaults.num_inference_steps,
                guidance_scale=defaults.guidance_scale if guidance is None else guidance,
                solver=solver or defaults.solver,
                height=height,
                width=width,
                adapter_scale=request.adapter_scale,
            )
            for index in range(request.n)
        ]

    def _check_pixels(self, width: int, height: int) -> None:
        native = self.base.native_resolution
        limit = self.config.limits.max_pixels or 4 * native * native
        unit = self.base.vae_scale_factor
        found = f"{width}x{height}"
        if width % unit or height % unit:
            what = f"this base makes sides that are multiples of {unit}"
            raise ParameterError("size", what, found, f"for example {native}x{native}")
        if width * height > limit:
            what = f"this endpoint makes at most {limit} pixels"
            raise ParameterError("size", what, found, f"for example {native}x{native}")

    def _completed(
        self, index: int, image: GeneratedImage, sample: SampleRequest
    ) -> CompletedEvent:
        assert sample.width is not None
        assert sample.height is not None
        unit = self.base.vae_scale_factor
        prompts = (sample.prompt, sample.negative_prompt)
        text_tokens = sum(len(token_split(self.base.tokenizer, prompt)) for prompt in prompts)
        image_tokens = sample.width * sample.height // unit**2
        return CompletedEvent(
            b64_json=base64.b64encode(image.picture).decode("ascii"),
            created_at=int(time.time()),
            size=f"{sample.width}x{sample.height}",
            usage=Usage(
                input_tokens=text_tokens,
                output_tokens=image_tokens,
                total_tokens=text_tokens + image_tokens,
                input_tokens_details=InputTokens(text_tokens=text_tokens),
            ),
            seed=image.finished.seed,
            image_index=index,
        )


def base_name(base: Base) -> str:
    """What requests call the base: `pocket`, a Hub id, or the name of its folder."""
    is_folder = Path(base.name).expanduser().resolve() == base.folder
    return base.folder.name if is_folder else base.name


def _data(image: GeneratedImage, form: str) -> ImageData:
    text = base64.b64encode(image.picture).decode("ascii")
    if form == "url":
        return ImageData(url=f"data:image/png;base64,{text}", seed=image.finished.seed)
    return ImageData(b64_json=text, seed=image.finished.seed)
