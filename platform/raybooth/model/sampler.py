"""m = m_u + g (m_c - m_u): batched classifier-free guidance (Ho and Salimans 2021).

Rows of different prompts, slots, solvers, step counts, guidance and seeds share one call of the
denoiser, each joining and leaving at any denoise step. A row with guidance is two rows of the call
(unconditional, conditional), one without is one. At one bucket (rows of the call) a row's bytes
never depend on what its neighbours are, nor, on a CPU with 1, 2 or 4 threads and buckets that
are powers of two, on its place among them (3 or 7 threads cut inside a row: rounding, 1e-6). Across
buckets an image moves by rounding. Latents are fp32 under any base dtype.

Shapes: R images, B denoiser rows (padded to the bucket), C H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from PIL import Image
from torch import Tensor

from raybooth.errors import RequestError
from raybooth.model.bank import Bank
from raybooth.model.base import Base, Conditioning, decode_latents, encode_prompts, predict
from raybooth.model.generation import GENERATOR_VERSION
from raybooth.model.resting import wakes
from raybooth.model.solver import RowPlan, plan_rows
from raybooth.model.text_adapter import TextAdapter

__all__ = [
    "GENERATOR_VERSION",
    "Row",
    "SampleRequest",
    "denoise_step",
    "generate",
    "guides",
    "row_image",
    "start_row",
]


ZERO_TERMINAL_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@dataclass(frozen=True)
class SampleRequest:
    """One image, as `StableDiffusionPipeline` would make it."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    solver: str = "dpmpp2m"
    height: int | None = None
    """Pixels; none means the base's own resolution."""

    width: int | None = None
    slot: int = 0
    adapter_scale: float = 1.0
    zero_terminal_snr: bool = False
    """For what was trained so (objective.zero_terminal_snr): the base's betas rescaled, and
    denoise steps that begin at the last timestep (Lin et al. 2023)."""

    text: TextAdapter | None = None
    """What both prompts mean to the slot's subject; None: what the base makes of them."""


@dataclass(eq=False)
class Row:
    """One image in flight."""

    request: SampleRequest
    plan: RowPlan
    latents_CHW: Tensor
    x0_prev_CHW: Tensor
    cond: Conditioning
    uncond: Conditioning | None
    """None where nothing guides (guidance <= 1, as in diffusers)."""

    guidance: float
    slot: int
    adapter_scale: float
    index: int = field(default=0)
    """Denoise steps that are done."""

    @property
    def num_rows(self) -> int:
        """Rows of a denoiser call that the image takes: 2 with guidance, 1 without."""
        return 1 if self.uncond is None else 2

    @property
    def done(self) -> bool:
        """Whether the latents are the image's."""
        return self.index >= self.plan.num_steps


def start_row(
    base: Base,
    request: SampleRequest,
    *,
    cond: Conditioning | None = None,
    uncond: Conditioning | None = None,
) -> Row:
    """A row at its first noise, drawn on the CPU as StableDiffusionPipeline draws it from the seed.

    `cond` and `uncond` (leading dim 1) save encoding the prompts again; `uncond` has no effect
    without guidance. Raises RequestError when this base cannot make such an image.
    """
    height = request.height or base.native_resolution
    width = request.width or base.native_resolution
    factor = base.vae_scale_factor
    if min(height, width) < factor or height % factor or width % factor:
        do = f"use multiples of {factor} pixels, {base.native_resolution} for example"
        raise RequestError("the base cannot make images of this size", f"{width}x{height}", do)
    schedule = base.scheduler_config
    if request.zero_terminal_snr:
        schedule = {**schedule, **ZERO_TERMINAL_SNR}
    plan = plan_rows(schedule, request.solver, request.num_inference_steps)
    shape = (1, base.latent_channels, height // factor, width // factor)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    latents_CHW = (noise * plan.init_scale)[0].to(base.device)
    cond = cond or _encode(base, request, request.prompt)
    sizes = base.family.size_conditioning((height, width), (0, 0), (height, width))
    if not guides(request):
        uncond = None
    elif base.negative_is_zeros and not request.negative_prompt:
        uncond = {name: torch.zeros_like(tensor) for name, tensor in cond.items()}
    else:
        uncond = uncond or _encode(base, request, request.negative_prompt)
    return Row(
        request=request,
        plan=plan,
        latents_CHW=latents_CHW,
        x0_prev_CHW=torch.zeros_like(latents_CHW),
        cond=_on(base, {**cond, **sizes}),
        uncond=None if uncond is None else _on(base, {**uncond, **sizes}),
        guidance=request.guidance_scale,
        slot=request.slot,
        adapter_scale=request.adapter_scale,
    )


def guides(request: SampleRequest) -> bool:
    """Whether the image needs an unconditional row beside its conditional one."""
    return request.guidance_scale > 1.0


@torch.no_grad()
def denoise_step(
    base: Base, bank: Bank | None, rows: Sequence[Row], bucket: int | None = None
) -> None:
    """Move each row one denoise step on, by ONE call of the denoiser on `bucket` rows.

    Rows are of one latent size and none is done; the rest of the bucket is filled with empty rows
    of the null adapter. `bucket` defaults to what the rows take. Without a bank, rows must be of
    slot 0 and the denoiser must carry no hooks. An error of the denoiser leaves every row as it
    was.
    """
    sides = [(row, side) for row in rows for side in _sides(row)]
    bucket = len(sides) if bucket is None else bucket
    assert 0 < len(sides) <= bucket
    assert not any(row.done for row in rows)
    num_empty = bucket - len(sides)
    x_RCHW = torch.stack([row.latents_CHW for row in rows])
    x0_prev_RCHW = torch.stack([row.x0_prev_CHW for row in rows])
    coefficients = torch.tensor(
        [(*row.plan.coefficients(row.index), max(row.guidance, 1.0)) for row in rows],
        dtype=torch.float64,
    )
    columns = coefficients.float().to(base.device).T[..., None, None, None]
    input_scale, a, b, c, d, cx, c0, ce, ch, guidance = columns
    timesteps = [float(row.plan.timesteps[row.index]) for row, _ in sides]
    timesteps_B = torch.tensor(timesteps + [0.0] * num_empty, device=base.device)
    if bank is not None:
        slots = [row.slot for row, _ in sides] + [0] * num_empty
        scales = [row.adapter_scale for row, _ in sides] + [1.0] * num_empty
        bank.route(torch.tensor(slots), torch.tensor(scales, dtype=torch.float64))
    else:
        assert not any(row.slot for row in rows), "a row names a slot, but there is no bank"
    inputs_RCHW = x_RCHW * input_scale
    last = list(accumulate(row.num_rows for row in rows))  # one past each image's conditional row
    inputs = [inputs_RCHW[place] for place, row in enumerate(rows) for _ in range(row.num_rows)]
    conditioning = {
        name: _stacked([side[name][0] for _, side in sides], bucket) for name in rows[0].cond
    }
    out_BCHW = predict(base, _stacked(inputs, bucket), timesteps_B, conditioning).float()
    cond_RCHW = torch.stack([out_BCHW[stop - 1] for stop in last])
    uncond_RCHW = torch.stack(
        [out_BCHW[stop - row.num_rows] for stop, row in zip(last, rows, strict=True)]
    )
    m = uncond_RCHW + guidance * (cond_RCHW - uncond_RCHW)  # cond itself where nothing guides
    x0 = a * x_RCHW + b * m
    e = c * x_RCHW + d * m
    x_next = cx * x_RCHW + c0 * x0 + ce * e + ch * x0_prev_RCHW
    for row, latents_CHW, x0_CHW in zip(rows, x_next, x0, strict=True):
        row.latents_CHW, row.x0_prev_CHW = latents_CHW, x0_CHW
        row.index += 1


@wakes
def generate(
    base: Base,
    bank: Bank | None,
    requests: Sequence[SampleRequest],
    *,
    max_rows: int = 16,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """An image for each request, in order, equal to StableDiffusionPipeline's for that seed.

    At most `max_rows` share a call; a new one joins as soon as one is done. The bucket is the next
    power of two, at most 2 x `max_rows`. `on_step(done, total)` counts denoise steps of all.
    """
    images: dict[int, Image.Image] = {}
    total = sum(request.num_inference_steps for request in requests)
    done = 0
    encoded: dict[tuple[object, ...], Conditioning] = {}

    def encode(request: SampleRequest, prompt: str) -> Conditioning:
        key = (prompt, request.text, request.text and request.adapter_scale)
        if key not in encoded:
            encoded[key] = _encode(base, request, prompt)
        return encoded[key]

    def start(request: SampleRequest) -> Row:
        uncond = encode(request, request.negative_prompt) if guides(request) else None
        return start_row(base, request, cond=encode(request, request.prompt), uncond=uncond)

    for places in _by_size(base, requests):
        waiting, active = list(places), dict[int, Row]()
        while waiting or active:
            while waiting and len(active) < max_rows:
                place = waiting.pop(0)
                active[place] = start(requests[place])
            rows = list(active.values())
            num_rows = sum(row.num_rows for row in rows)
            bucket = min(2 * max_rows, 1 << (num_rows - 1).bit_length())
            denoise_step(base, bank, rows, bucket)
            done += len(rows)
            for place, row in list(active.items()):
                if row.done:
                    images[place] = row_image(base, row)
                    del active[place]
            if on_step is not None:
                on_step(done, total)
    return [images[place] for place in range(len(requests))]


def row_image(base: Base, row: Row) -> Image.Image:
    """The picture of a row that is done."""
    return Image.fromarray(decode_latents(base, row.latents_CHW[None])[0].numpy())


def _encode(base: Base, request: SampleRequest, prompt: str) -> Conditioning:
    if request.text is None:
        return encode_prompts(base, [prompt])
    return request.text.encode(prompt, request.adapter_scale)


def _on(base: Base, conditioning: Conditioning) -> Conditioning:
    return {name: tensor.to(base.device) for name, tensor in conditioning.items()}


def _stacked(tensors: Sequence[Tensor], bucket: int) -> Tensor:
    """[bucket, ...], zeros after the last."""
    return torch.stack([*tensors, *[torch.zeros_like(tensors[0])] * (bucket - len(tensors))])


def _sides(row: Row) -> list[Conditioning]:
    """The conditioning of each of the image's rows."""
    return [row.cond] if row.uncond is None else [row.uncond, row.cond]


def _by_size(base: Base, requests: Sequence[SampleRequest]) -> list[list[int]]:
    sizes: dict[tuple[int, int], list[int]] = {}
    for place, request in enumerate(requests):
        native = base.native_resolution
        sizes.setdefault((request.height or native, request.width or native), []).append(place)
    return list(sizes.values())
