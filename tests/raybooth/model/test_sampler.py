"""Our images are StableDiffusionPipeline's, alone or in a mixed batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from tests.tiny import write_tiny_base
from torch import Tensor

from raybooth.errors import RequestError
from raybooth.model.bank import Bank
from raybooth.model.base import Base, decode_latents, load_base
from raybooth.model.lora import AdapterTensors, LoraPair, Site, find_sites, save_adapter
from raybooth.model.sampler import Row, SampleRequest, denoise_step, generate, row_image, start_row

BASES = {
    "epsilon": ("epsilon", False),
    "velocity": ("v_prediction", False),
    "zero_snr": ("v_prediction", True),
}
MIXED = (
    SampleRequest("a photo of sks dog", seed=1, slot=1, num_inference_steps=4),
    SampleRequest("a red cat", "blue", 2, 3, 3.0, "ddim", slot=2, adapter_scale=0.5),
    SampleRequest("a vase", seed=3, num_inference_steps=5, guidance_scale=1.0, solver="euler"),
    SampleRequest("a robot in the snow", "a dog", 4, 3, 12.0, "euler", slot=3),
    SampleRequest("a robot in the snow", "a dog", 4, 3, 12.0, "euler", slot=1),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write_tiny_base(
            tmp_path_factory.mktemp(name), prediction_type=prediction, zero_snr=zero_snr
        )
        for name, (prediction, zero_snr) in BASES.items()
    }


@pytest.fixture(scope="module")
def bases(folders: dict[str, Path]) -> dict[str, Base]:
    return {name: load_base(str(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def base(bases: dict[str, Base]) -> Base:
    return bases["epsilon"]


@pytest.fixture
def bank(base: Base) -> Any:
    sites = find_sites(base.denoiser, "all")
    bank = Bank(base.denoiser, sites=sites, rank=4, num_slots=3, device="cpu")
    for slot in (1, 2, 3):
        bank.write(slot, _adapter(sites, slot))
    yield bank
    bank.detach()


def _adapter(sites: tuple[Site, ...], seed: int) -> AdapterTensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: LoraPair(
            torch.randn(site.down_shape(4), generator=generator) / 4,
            torch.randn(site.up_shape(4), generator=generator) * 0.05,
        )
        for site in sites
    }


def _pipeline(folder: Path, solver: str) -> Any:
    """Plain diffusers, set as solver.py's docstring tells people to."""
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    if solver == "ddim":
        pipe.scheduler = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
    elif solver == "euler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(
            config, final_sigmas_type="zero", timestep_type="discrete"
        )
    else:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            config,
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            lower_order_final=True,
            euler_at_final=False,
            final_sigmas_type="zero",
            thresholding=False,
        )
    return pipe


def _theirs(pipe: Any, request: SampleRequest) -> tuple[Tensor, Image.Image]:
    latents = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
    ).images
    with torch.no_grad():
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return latents[0], pipe.image_processor.postprocess(image, output_type="pil")[0]


def _latents(
    base: Base, bank: Bank | None, requests: list[SampleRequest], bucket: int | None = None
) -> list[Tensor]:
    rows = [start_row(base, request) for request in requests]
    while active := [row for row in rows if not row.done]:
        denoise_step(base, bank, active, bucket)
    return [row.latents_CHW for row in rows]


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp2m"])
@pytest.mark.parametrize("name", BASES)
def test_an_image_is_the_pipelines(
    folders: dict[str, Path], bases: dict[str, Base], name: str, solver: str
) -> None:
    base, pipe = bases[name], _pipeline(folders[name], solver)
    # Euler from sigma 4096: see test_solver.py
    bound = 1e-4 if (name, solver) == ("zero_snr", "euler") else 1e-5
    for num_steps, guidance in ((4, 7.5), (16, 3.0), (4, 1.0), (3, 0.5)):
        request = SampleRequest("a photo of a red dog", "a cat", 5, num_steps, guidance, solver)
        latents, image = _theirs(pipe, request)
        assert _apart(_latents(base, None, [request])[0], latents) < bound
        ours = generate(base, None, [request])[0]
        assert ours.size == (32, 32)
        assert _levels_apart(ours, image) <= 1


def test_other_sizes_are_the_pipelines(base: Base, folders: dict[str, Path]) -> None:
    request = SampleRequest("a vase", seed=2, num_inference_steps=4, height=48, width=24)
    latents, image = _theirs(_pipeline(folders["epsilon"], "dpmpp2m"), request)
    assert _apart(_latents(base, None, [request])[0], latents) < 1e-5
    ours = generate(base, None, [request])[0]
    assert ours.size == (24, 48)
    assert _levels_apart(ours, image) <= 1


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_saved_adapter_gives_the_same_image_in_plain_diffusers(
    folders: dict[str, Path], tmp_path: Path, targets: Any
) -> None:
    """Equivalence 1, second half, and 4, last part."""
    base = load_base(str(folders["epsilon"]))
    sites = find_sites(base.denoiser, targets)
    adapter, scale = _adapter(sites, 1), 0.75
    save_adapter(tmp_path / "pytorch_lora_weights.safetensors", adapter, scale)
    bank = Bank(base.denoiser, sites=sites, rank=8, num_slots=2, device="cpu")
    bank.write(2, adapter, scale)
    request = SampleRequest("a photo of sks dog", seed=7, num_inference_steps=8, slot=2)
    pipe = _pipeline(folders["epsilon"], "dpmpp2m")
    plain, _ = _theirs(pipe, request)
    pipe.load_lora_weights(tmp_path)
    latents, image = _theirs(pipe, request)
    assert _apart(plain, latents) > 0.05
    assert _apart(_latents(base, bank, [request])[0], latents) < 2e-5
    assert _levels_apart(generate(base, bank, [request])[0], image) <= 1


def test_a_mixed_batch_changes_no_bit_of_an_image_at_one_bucket(base: Base, bank: Bank) -> None:
    """Equivalence 4: different slots, solvers, steps, guidance and seeds in one call."""
    mixed = _latents(base, bank, list(MIXED), bucket=16)
    for request, latents in zip(MIXED, mixed, strict=True):
        assert torch.equal(_latents(base, bank, [request], bucket=16)[0], latents)
    assert not torch.equal(mixed[3], mixed[4])
    joined = _staggered(base, bank)
    for latents, other in zip(mixed, joined, strict=True):
        assert torch.equal(latents, other)


def _staggered(base: Base, bank: Bank) -> list[Tensor]:
    """Each request joins one denoise step after the one before it; the last ones first."""
    waiting = list(reversed(MIXED))
    rows: list[Row] = []
    while waiting or any(not row.done for row in rows):
        if waiting:
            rows.append(start_row(base, waiting.pop(0)))
        denoise_step(base, bank, [row for row in rows if not row.done], bucket=16)
    return [row.latents_CHW for row in reversed(rows)]


def test_across_buckets_an_image_moves_by_rounding_only(base: Base, bank: Bank) -> None:
    alone = [_latents(base, bank, [request], bucket=2)[0] for request in MIXED[:4]]
    for bucket in (4, 32):
        for request, latents in zip(MIXED[:4], alone, strict=True):
            other = _latents(base, bank, [request], bucket=bucket)[0]
            assert _apart(other, latents) < 2e-5


def test_no_unconditional_row_where_nothing_guides(base: Base, bank: Bank) -> None:
    """The bytes of an unguided image are those beside guided ones; its call has one row."""
    sizes: list[int] = []
    hook = base.denoiser.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    unguided = [replace(MIXED[0], guidance_scale=g, num_inference_steps=3) for g in (1.0, 0.0)]
    alone = _latents(base, bank, unguided[:1])
    _latents(base, bank, unguided)
    rows = [start_row(base, request) for request in (*unguided, MIXED[0])]
    denoise_step(base, bank, rows)
    hook.remove()
    assert sizes == [1] * 3 + [2] * 3 + [4]
    assert [row.num_rows for row in rows] == [1, 1, 2]
    padded = _latents(base, bank, [MIXED[3], unguided[0], MIXED[1]], bucket=8)[1]
    assert torch.equal(_latents(base, bank, unguided[:1], bucket=8)[0], padded)
    assert _apart(alone[0], padded) < 2e-5


def test_an_error_of_the_denoiser_leaves_rows_as_they_were(base: Base, bank: Bank) -> None:
    rows = [start_row(base, request) for request in MIXED[:2]]
    denoise_step(base, bank, rows)
    before = [row.latents_CHW.clone() for row in rows]

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    hook = base.denoiser.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        denoise_step(base, bank, rows)
    hook.remove()
    assert [row.index for row in rows] == [1, 1]
    for row, latents in zip(rows, before, strict=True):
        assert torch.equal(row.latents_CHW, latents)


def test_generate_keeps_order_and_counts_steps(base: Base, bank: Bank) -> None:
    requests = [*MIXED, replace(MIXED[0], height=48, width=48)]
    seen: list[tuple[int, int]] = []
    images = generate(
        base, bank, requests, max_rows=2, on_step=lambda done, total: seen.append((done, total))
    )
    total = sum(request.num_inference_steps for request in requests)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    for request, image in zip(requests, images, strict=True):
        assert _levels_apart(image, generate(base, bank, [request])[0]) <= 1


def test_decoding_does_not_know_neighbours(base: Base) -> None:
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = decode_latents(base, latents)
    assert together.dtype == torch.uint8
    assert together.shape == (5, 32, 32, 3)
    for place in range(5):
        assert torch.equal(decode_latents(base, latents[place : place + 1])[0], together[place])


def test_a_seed_is_the_noise(base: Base) -> None:
    first, second = (start_row(base, replace(MIXED[0], seed=seed)) for seed in (3, 4))
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(3))
    assert torch.equal(first.latents_CHW, noise[0])
    assert not torch.equal(first.latents_CHW, second.latents_CHW)


def test_half_precision_keeps_latents_fp32(folders: dict[str, Path]) -> None:
    base = load_base(str(folders["epsilon"]), dtype=torch.bfloat16)
    request = SampleRequest("a photo of a dog", seed=1, num_inference_steps=6)
    row = start_row(base, request)
    while not row.done:
        denoise_step(base, None, [row])
        assert row.latents_CHW.dtype == torch.float32
    full = load_base(str(folders["epsilon"]))
    assert 0 < _apart(row.latents_CHW, _latents(full, None, [request])[0]) < 0.05
    assert row_image(base, row).size == (32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 33}, "cannot make images of this size"),
        ({"width": 2}, "cannot make images of this size"),
        ({"num_inference_steps": 0}, "out of range"),
        ({"solver": "heun"}, "solver is not known"),
    ],
)
def test_impossible_requests_are_refused(base: Base, change: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        start_row(base, replace(MIXED[0], **change))


def _apart(ours: Tensor, reference: Tensor) -> float:
    """max|d| / max|ref|."""
    return float((ours - reference).abs().max() / reference.abs().max())


def _levels_apart(ours: Image.Image, reference: Image.Image) -> int:
    return int(np.abs(np.asarray(ours, int) - np.asarray(reference, int)).max())


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp2m"])
def test_what_was_trained_to_zero_terminal_snr_is_sampled_so(
    bases: dict[str, Base], solver: str
) -> None:
    """As a base of the same weights whose own schedule is rescaled and trailing."""
    request = SampleRequest("a red cat", seed=3, num_inference_steps=4, solver=solver)
    rescaled = replace(request, zero_terminal_snr=True)
    (plain, found) = generate(bases["velocity"], None, [request, rescaled])
    (expected, _) = generate(bases["zero_snr"], None, [request, request])
    assert found.tobytes() == expected.tobytes()
    assert found.tobytes() != plain.tobytes()
