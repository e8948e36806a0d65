"""Latents become pictures off the tick: VAE decode at batch 1, then the order's own encoding."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from raybooth.errors import ServingError
from raybooth.model.base import Base, decode_latents
from raybooth_serving.engine.flight import Flight
from raybooth_serving.engine.orders import Partial

Result = TypeVar("Result")


class Decoder:
    """One thread decodes, in order; others encode, so that PNG never holds up a decode."""

    def __init__(
        self,
        base: Base,
        succeed: Callable[[Flight, bytes], None],
        fail: Callable[[Flight, BaseException], None],
    ) -> None:
        """`succeed` takes a finished image's bytes, `fail` whatever went wrong with an image:
        ServingError for NaN, what the order's own encoding raises."""
        self.base = base
        self.seconds = 0.0
        """What an image takes from its last denoise step to its bytes; moves by a tenth."""

        self._succeed, self._fail = succeed, fail
        self._showing: set[asyncio.Task[None]] = set()
        self._finishing: set[asyncio.Task[None]] = set()
        self._stream = _side_stream(base.device)
        self._decode = ThreadPoolExecutor(1, "decode")
        self._encode = ThreadPoolExecutor(2, "encode")

    @property
    def num_finishing(self) -> int:
        """Images that are denoised and have no bytes yet."""
        return len(self._finishing)

    def show(self, image: Flight, partial_index: int) -> None:
        """Tell the image's listener what its last x0 prediction looks like."""
        work = self._show(image, partial_index, image.row.x0_prev_CHW)
        image.partials.append(self._start(image, work, self._showing))

    def finish(self, image: Flight) -> None:
        """Make the bytes of an image that is denoised, after its partial images."""
        self._start(image, self._finish(image), self._finishing)

    async def close(self) -> None:
        """Wait for what is being made."""
        await asyncio.gather(*self._showing, *self._finishing, return_exceptions=True)
        self._decode.shutdown()
        self._encode.shutdown()

    def _start(
        self, image: Flight, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]
    ) -> asyncio.Task[None]:
        def end(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if error is not None:
                self._fail(image, error)

        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(end)
        return task

    async def _show(self, image: Flight, partial_index: int, x0_CHW: Tensor) -> None:
        encode = image.order.encode_partial
        picture = await _on(self._decode, lambda: self._pixels(x0_CHW))
        encoded = await _on(self._encode, lambda: encode(picture))
        image.tell(Partial(image.index, partial_index, encoded))

    async def _finish(self, image: Flight) -> None:
        await asyncio.gather(*image.partials)
        started = time.perf_counter()
        encode, finished = image.order.encode, image.finished()
        picture = await _on(self._decode, lambda: self._pixels(image.row.latents_CHW))
        encoded = await _on(self._encode, lambda: encode(picture, finished))
        seconds = time.perf_counter() - started
        self.seconds += (seconds - self.seconds) * (0.1 if self.seconds else 1.0)
        self._succeed(image, encoded)

    def _pixels(self, latents_CHW: Tensor) -> Image.Image:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            if not torch.isfinite(latents_CHW).all():
                do = "lower guidance_scale or adapter_scale; if it stays, train the subject again"
                raise ServingError("the image came out as no numbers", "NaN or infinity", do)
            try:
                pixels_HWC = decode_latents(self.base, latents_CHW[None])[0]
            except torch.OutOfMemoryError as error:
                height, width = latents_CHW.shape[1:]
                what, found = "the picture does not fit the memory", f"{height}x{width} latents"
                raise ServingError(what, found, "ask for a smaller one") from error
            return Image.fromarray(pixels_HWC.numpy())


def _side_stream(device: torch.device) -> Any:
    """A decode does not wait for the tick's kernels, nor they for it."""
    cuda: Any = torch.cuda
    return cuda.Stream(device) if device.type == "cuda" else None


async def _on(executor: ThreadPoolExecutor, act: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(executor, act)
