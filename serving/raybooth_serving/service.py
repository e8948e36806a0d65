"""One base, its catalog and its engine behind the API's own words; knows neither HTTP nor Ray."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from raybooth.config import ServeConfig, ServedBase
from raybooth.config.adapter import countable
from raybooth.model.base import Base, cut_tokens, load_base
from raybooth.model.sampler import SampleRequest, guides
from raybooth.store import FullRecord, Store
from raybooth_serving.access.policy import check_prompt, load_policy
from raybooth_serving.access.safety import SafetyChecker
from raybooth_serving.engine.loop import Engine
from raybooth_serving.engine.orders import Event, Finished, GeneratedImage, Order, Part
from raybooth_serving.engine.scheduler import choose_bucket
from raybooth_serving.errors import DeadlineError
from raybooth_serving.names.catalog import Catalog, KnownBase
from raybooth_serving.names.lookup import Lookup
from raybooth_serving.names.parts import resolve_parts
from raybooth_serving.pictures.drawing import Drawing
from raybooth_serving.pictures.fingerprint import DTYPES, fingerprint_engine, fingerprint_full
from raybooth_serving.pictures.receipt import UsedBase
from raybooth_serving.wire.api import (
    ImagesRequest,
    ImagesResponse,
    ModelList,
    ParameterError,
    check_limits,
    parse_size,
)
from raybooth_serving.wire.caller import Caller
from raybooth_serving.wire.streams import Events, StreamEvent


class Service:
    """Answers requests from one replica's engine."""

    def __init__(
        self,
        base: Base,
        store: Store,
        config: ServeConfig,
        served: ServedBase,
        full: FullRecord | None = None,
    ) -> None:
        """`full` is the full fine-tune whose weights `base` has, if it has not its own."""
        self.base = base
        self.config = config
        self.served = served
        self.full = full
        self.known = _known(base, full)
        self.name = self.known.name
        self.engine = Engine(base, store, served.engine)
        self.catalog = Catalog(store, [self.known], self.engine.forget, metrics=self.engine.metrics)
        self.lookup = Lookup(config.limits.store_timeout_s)
        self.fingerprint = fingerprint_engine(base, served.engine)
        safety = config.safety
        self.policy = None if safety.policy is None else load_policy(safety.policy)
        self.checker = None if safety.checker is None else SafetyChecker(safety, base.device)

    @classmethod
    def start(cls, config: ServeConfig, served: ServedBase, store: Store) -> Service:
        """Load `served`, one of the bases of `config`, onto the device that there is."""
        return cls(load_served(served), store, config, served)

    async def generate(self, request: ImagesRequest, caller: Caller) -> ImagesResponse:
        """The images of `request`, or the error that says why not."""
        drawing = await self._resolve(request, caller)
        images = await self._draw(drawing, caller)
        return ImagesResponse(
            created=int(time.time()),
            data=[drawing.data(image) for image in images],
            size=drawing.size,
            output_format=drawing.format,
            usage=drawing.usage(len(images)),
            model="+".join(part.record.reference for part in drawing.parts) or self.name,
        )

    async def stream(
        self, request: ImagesRequest, caller: Caller
    ) -> AsyncGenerator[StreamEvent, None]:
        """The events of `request`, each image's completed one as soon as it is done."""
        drawing = await self._resolve(request, caller)
        events = Events()
        async with aclosing(events.during(self._draw(drawing, caller, events))) as stream:
            async for event in stream:
                yield event

    async def models(self, with_versions: bool, caller: Caller) -> ModelList:
        """What `caller` can ask for now."""
        catalog = self.catalog.seen_by(caller.subjects)
        return ModelList(data=await self.lookup.cards(catalog, with_versions))

    async def metrics(self) -> dict[str, float]:
        """The engine's counters."""
        return self.engine.snapshot()

    async def check_health(self) -> None:
        """Raises ServingError when the engine has died."""
        self.engine.check_health()

    async def _resolve(self, request: ImagesRequest, caller: Caller) -> Drawing:
        check_limits(request, self.config.limits)
        catalog = self.catalog.seen_by(caller.subjects)
        parts = await self.lookup.ask(catalog, lambda it: resolve_parts(it, request))
        samples = tuple(self._samples(request, parts))
        if self.policy is not None:
            subjects = [part.record.subject_id for part in parts]
            subjects += [] if self.full is None else [self.full.subject_id]
            asked = (request.prompt, request.negative_prompt, subjects, caller.key_name)
            await asyncio.to_thread(check_prompt, self.policy, *asked)
        return Drawing(
            base=self.base,
            used=UsedBase(
                name=self.name, revision=self.served.revision, fingerprint=self.known.fingerprint
            ),
            fingerprint=self.fingerprint,
            request=request,
            samples=samples,
            parts=parts,
            keep_prompt=self.config.pictures.keep_prompt,
            checker=self.checker,
        )

    async def _draw(
        self, drawing: Drawing, caller: Caller, events: Events | None = None
    ) -> list[GeneratedImage]:
        """The images of `drawing`; `events` is told what happens until then."""
        timeout_s = self.config.limits.timeout_s
        if caller.deadline_s is not None:
            timeout_s = min(timeout_s, caller.deadline_s)
        order = Order(
            samples=drawing.samples,
            parts=drawing.parts,
            tenant=caller.tenant,
            deadline=time.monotonic() + timeout_s,
            bucket=self._pinned(drawing) if drawing.request.deterministic else None,
            partial_images=drawing.request.partial_images,
            encode=drawing.encode,
            encode_partial=drawing.encode_partial,
        )
        if events is not None:
            order = _told(order, drawing, events)
        try:
            async with asyncio.timeout(timeout_s):
                return await self.engine.generate(order)
        except TimeoutError as error:
            what, do = "the images took too long", "ask for fewer or smaller images"
            raise DeadlineError(what, f"over {timeout_s:g} s", do) from error

    def _pinned(self, drawing: Drawing) -> int:
        """The smallest bucket that holds an image of `drawing` alone."""
        num_rows = 2 if any(guides(sample) for sample in drawing.samples) else 1
        return choose_bucket(num_rows, self.served.engine.row_buckets)

    def _samples(self, request: ImagesRequest, parts: Sequence[Part]) -> list[SampleRequest]:
        """One for each image; raises ParameterError for what the base cannot make."""
        defaults = self.served.defaults
        width, height = parse_size(request.size, self.base.native_resolution)
        self._check_pixels(width, height)
        for name in ("prompt", "negative_prompt"):
            prompt = getattr(request, name)
            for record in (part.record for part in parts):
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
                zero_terminal_snr=self.full is not None and self.full.zero_terminal_snr,
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


def load_served(served: ServedBase) -> Base:
    """The base of `served` on the device that there is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[served.precision]
    return load_base(served.base, revision=served.revision, device=device, dtype=dtype)


def _known(base: Base, full: FullRecord | None) -> KnownBase:
    """What requests call it, and which weights it has."""
    if full is None:
        return KnownBase(base_name(base), base.fingerprint)
    return KnownBase(full.reference, fingerprint_full(base.fingerprint, full))


def base_name(base: Base) -> str:
    """What requests call the base: `pocket`, a Hub id, or the name of its folder."""
    is_folder = Path(base.name).expanduser().resolve() == base.folder
    return base.folder.name if is_folder else base.name


def _told(order: Order, drawing: Drawing, events: Events) -> Order:
    """`order`, whose every image goes to `events` as soon as it is encoded."""
    loop = asyncio.get_running_loop()

    def encode(image: Image.Image, finished: Finished) -> bytes:
        picture = order.encode(image, finished)
        completed = drawing.completed(picture, finished)
        loop.call_soon_threadsafe(events.put, completed)
        return picture

    def tell(event: Event) -> None:
        events.put(drawing.told(event))

    return replace(order, encode=encode, on_event=tell)
