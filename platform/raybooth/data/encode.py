"""Photos, captions and masks of a subject as tensors, cached on disk by content.

N samples (photos times flips times crops), M different prompts, B rows, C H W channels, height,
width; latents of different sizes are padded with zeros at the bottom and the right.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from raybooth.data.framing import (
    Size,
    bucket_sizes,
    mask_of,
    nearest_size,
    pixels_of,
    plan_frame,
)
from raybooth.data.images import load_mask, load_photo, photo_digest
from raybooth.data.prior import PriorCache, PriorTensors
from raybooth.data.prior_key import prior_key
from raybooth.data.whole_file import read_checked, seal, sha256_hex, unseal, way_out, write_whole
from raybooth.errors import PriorError, SubjectError, TrainingError
from raybooth.sidecar import mask_file
from raybooth.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from raybooth.model.base import Base

log = logging.getLogger(__name__)

FORMAT = 2
"""Raised when photos become latents in another way, so that no old file is taken for a new one."""
PROMPT, CLASS_PROMPT, SIZE = "prompt.", "class prompt.", "size."
"""What the names of a file's conditioning begin with."""


@dataclass(frozen=True)
class SubjectTensors:
    """All that training one subject reads (fp32, on the CPU)."""

    mean_NCHW: Tensor
    std_NCHW: Tensor
    """VAE posterior, not multiplied by the scaling factor; samples of one photo lie together."""
    instance_conditioning: dict[str, Tensor]
    """Of the instance prompt or, with captions, of every different one: leading dimension M."""
    prior: PriorTensors | None
    photo_digests: tuple[str, ...]
    prompt_N: tuple[int, ...] = ()
    """Each sample's place in M; empty when all have the first."""
    size_N: tuple[Size, ...] = ()
    """Each sample's latent (height, width); empty when all fill their tensors."""
    size_conditioning: dict[str, Tensor] = field(default_factory=dict)
    """Leading dimension N; empty where the family has none."""
    mask_NHW: Tensor | None = None
    """Share of the subject in each latent pixel, [0, 1]."""
    class_conditioning: dict[str, Tensor] = field(default_factory=dict)
    """Of the class prompt, leading dimension 1; read by prior.kind: base_prediction alone."""
    prompts: tuple[str, ...] = ()
    """The M prompts in words."""
    sidecar_digests: tuple[str, ...] = ()


def encode_subject(
    base: Base, subject: Subject, cache_root: Path, *, priors: PriorCache | None = None
) -> SubjectTensors:
    """The subject's posterior latents and embedding, from `cache_root` when they are there.

    Keyed by all that decides them: base, dtype, kind of device, the photos' and masks' bytes in
    order, their captions, shapes, crops and flips. `priors` must hold the subject's prior (make it
    first) when the subject has one. Raises SubjectError for a photo or what lies beside it,
    PriorError for the prior, TrainingError when the cache cannot be written.
    """
    photo_digests = tuple(photo_digest(path) for path in subject.images)
    digest = _digest(base, subject, photo_digests)
    try:
        tensors = _read(cache_root, digest)
        if tensors is None:
            tensors = _encode(base, subject, photo_digests)
            _write(cache_root, digest, tensors)
    except OSError as error:
        what = f"the photos of subject {subject.subject_id!r} cannot be kept in {cache_root}"
        raise TrainingError(what, error.strerror or str(error), way_out(error)) from error
    sizes = tensors["sizes"].tolist()
    return SubjectTensors(
        mean_NCHW=tensors["mean"],
        std_NCHW=tensors["std"],
        instance_conditioning=_part(tensors, PROMPT),
        prior=_load_prior(base, subject, priors),
        photo_digests=photo_digests,
        prompt_N=tuple(tensors["prompts"].tolist()),
        size_N=tuple((height, width) for height, width in sizes),
        size_conditioning=_part(tensors, SIZE),
        mask_NHW=tensors.get("mask"),
        class_conditioning=_part(tensors, CLASS_PROMPT),
        prompts=_prompts(subject),
        sidecar_digests=subject.sidecar_digests(),
    )


def buckets(subject: Subject, step: int) -> tuple[Size, ...]:
    """Sizes that the subject's photos are cropped to; `step` divides every side."""
    side = subject.train.resolution
    return ((side, side),) if subject.train.photos.fit == "square" else bucket_sizes(side, step)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _prompts(subject: Subject) -> tuple[str, ...]:
    """The different prompts of the photos, in their order."""
    return tuple(dict.fromkeys(subject.caption(image) for image in subject.images))


def _digest(base: Base, subject: Subject, photo_digests: tuple[str, ...]) -> str:
    train = subject.train
    parts = {
        "format": FORMAT,
        "base": base.fingerprint,
        "dtype": str(base.dtype),
        "device": base.device.type,
        "photos": photo_digests,
        "prompts": [subject.caption(image) for image in subject.images],
        "class_prompt": _class_prompt(subject),
        "resolution": train.resolution,
        "fit": train.photos.fit,
        "flip": train.photos.flip,
        "masks": subject.sidecar_digests() if train.photos.masks else None,
        "only_subject": train.photos.masks and train.photos.background_weight == 0,
        "crop": train.crop,
        "crops_per_image": train.crops_per_image,
        "seed": subject.seed if train.crop == "random" else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _class_prompt(subject: Subject) -> str | None:
    """None unless the base itself is asked what it predicts for it."""
    return subject.class_prompt if subject.train.prior.kind == "base_prediction" else None


def _encode(base: Base, subject: Subject, photo_digests: tuple[str, ...]) -> dict[str, Tensor]:
    import torch

    from raybooth.model.base import encode_prompts

    samples = [
        sample
        for path, digest in zip(subject.images, photo_digests, strict=True)
        for sample in _encode_photo(base, subject, path, digest)
    ]
    prompts = _prompts(subject)
    tensors = {
        "mean": _padded([sample.mean_CHW for sample in samples]),
        "std": _padded([sample.std_CHW for sample in samples]),
        "sizes": torch.tensor([sample.mean_CHW.shape[1:] for sample in samples]),
        "prompts": torch.tensor([prompts.index(sample.prompt) for sample in samples]),
    }
    if subject.train.photos.masks:
        tensors["mask"] = _padded([sample.mask_HW for sample in samples])
    for name in samples[0].size_conditioning:
        rows = [sample.size_conditioning[name] for sample in samples]
        tensors[SIZE + name] = torch.cat(rows).float().cpu()
    for name, tensor in encode_prompts(base, prompts).items():
        tensors[PROMPT + name] = tensor.float().cpu()
    class_prompt = _class_prompt(subject)
    if class_prompt is not None:
        for name, tensor in encode_prompts(base, [class_prompt]).items():
            tensors[CLASS_PROMPT + name] = tensor.float().cpu()
    return tensors


@dataclass(frozen=True)
class _Sample:
    """One crop of one photo, mirrored or not."""

    mean_CHW: Tensor
    std_CHW: Tensor
    mask_HW: Tensor
    size_conditioning: dict[str, Tensor]
    prompt: str


def _encode_photo(base: Base, subject: Subject, path: Path, digest: str) -> Iterator[_Sample]:
    import torch

    from raybooth.model.base import encode_images

    train, factor = subject.train, base.vae_scale_factor
    photo = load_photo(path)
    masked = train.photos.masks and mask_file(path).exists()
    mask = load_mask(mask_file(path), photo) if masked else None
    original = (photo.height, photo.width)
    size = nearest_size(original, buckets(subject, base.least_side))
    for flip in (False, True) if train.photos.flip else (False,):
        for crop in range(train.crops_per_image):
            seed = _crop_seed(subject.seed, digest, crop)
            frame = plan_frame(original, size, train.crop, seed, flip=flip)
            mean_BCHW, std_BCHW = encode_images(base, pixels_of(photo, frame)[None])
            mask_HW = torch.ones(mean_BCHW.shape[2:])
            if mask is not None:
                mask_HW = mask_of(mask, frame, factor)
                if train.photos.background_weight == 0 and not mask_HW.any():
                    do = "use crop: center, or a background_weight above 0"
                    what = f"a crop of {path} shows nothing of its mask"
                    raise SubjectError(what, f"{train.crop} crop number {crop}", do)
            yield _Sample(
                mean_BCHW[0].cpu(),
                std_BCHW[0].cpu(),
                mask_HW,
                base.family.size_conditioning(original, frame.top_left, size),
                subject.caption(path),
            )


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """[N, ...], the last two dimensions padded with zeros to the largest."""
    height = max(tensor.shape[-2] for tensor in tensors)
    width = max(tensor.shape[-1] for tensor in tensors)
    padded = tensors[0].new_zeros((len(tensors), *tensors[0].shape[:-2], height, width))
    for place, tensor in enumerate(tensors):
        padded[place, ..., : tensor.shape[-2], : tensor.shape[-1]] = tensor
    return padded


def _crop_seed(seed: int, digest: str, crop: int) -> int:
    data = hashlib.sha256(f"raybooth crop\n{seed}\n{digest}\n{crop}".encode()).digest()
    return int.from_bytes(data[:8], "big") >> 1


def _load_prior(base: Base, subject: Subject, priors: PriorCache | None) -> PriorTensors | None:
    num_images = subject.train.prior.num_images
    if num_images == 0:
        return None
    if priors is None:
        what = f"subject {subject.subject_id!r} needs a prior"
        raise PriorError(what, "no prior cache", "give the cache, or set prior.num_images to 0")
    key = prior_key(subject.train, subject.class_prompt, base.fingerprint)
    return priors.load(key, num_images)


def _read(cache_root: Path, digest: str) -> dict[str, Tensor] | None:
    from safetensors.torch import load

    try:
        record = unseal(_record_path(cache_root, digest).read_bytes())
    except FileNotFoundError:
        return None
    path = _tensors_path(cache_root, digest)
    data = read_checked(path, str(record["tensors_sha256"])) if record is not None else None
    if data is None:
        log.warning("the encoded photos in %s are damaged, they are made again", path)
        return None
    return load(data)


def _write(cache_root: Path, digest: str, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    cache_root.mkdir(parents=True, exist_ok=True)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_whole(_tensors_path(cache_root, digest), data)
    write_whole(_record_path(cache_root, digest), seal({"tensors_sha256": sha256_hex(data)}))


def _tensors_path(cache_root: Path, digest: str) -> Path:
    return cache_root / f"{digest}.safetensors"


def _record_path(cache_root: Path, digest: str) -> Path:
    return cache_root / f"{digest}.json"
