"""Photos and prompt of a subject as tensors, cached on disk by content.

N photos times crops, B rows, C H W channels, height, width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raybooth.data.images import load_photo, photo_digest, to_pixels
from raybooth.data.prior import PriorCache, PriorTensors
from raybooth.data.prior_key import prior_key
from raybooth.data.whole_file import read_checked, seal, sha256_hex, unseal, way_out, write_whole
from raybooth.errors import PriorError, TrainingError
from raybooth.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from raybooth.model.base import Base

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised when photos become latents in another way, so that no old file is taken for a new one."""
PROMPT_PREFIX = "prompt."


@dataclass(frozen=True)
class SubjectTensors:
    """All that training one subject reads (fp32, on the CPU)."""

    mean_NCHW: Tensor
    std_NCHW: Tensor
    """VAE posterior, not multiplied by the scaling factor; crops of one photo lie together."""
    instance_conditioning: dict[str, Tensor]
    """Of the instance prompt, leading dimension 1."""
    prior: PriorTensors | None
    photo_digests: tuple[str, ...]


def encode_subject(
    base: Base, subject: Subject, cache_root: Path, *, priors: PriorCache | None = None
) -> SubjectTensors:
    """The subject's posterior latents and embedding, from `cache_root` when they are there.

    Keyed by all that decides them: base, dtype, kind of device, the photos' bytes in order,
    resolution, crop and prompt. `priors` must hold the subject's prior (make it first) when the
    subject has one. Raises SubjectError for a photo, PriorError for the prior, TrainingError when
    the cache cannot be written.
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
    return SubjectTensors(
        mean_NCHW=tensors["mean"],
        std_NCHW=tensors["std"],
        instance_conditioning={
            name.removeprefix(PROMPT_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(PROMPT_PREFIX)
        },
        prior=_load_prior(base, subject, priors),
        photo_digests=photo_digests,
    )


def _digest(base: Base, subject: Subject, photo_digests: tuple[str, ...]) -> str:
    train = subject.train
    parts = {
        "format": FORMAT,
        "base": base.fingerprint,
        "dtype": str(base.dtype),
        "device": base.device.type,
        "photos": photo_digests,
        "prompt": subject.instance_prompt,
        "resolution": train.resolution,
        "crop": train.crop,
        "crops_per_image": train.crops_per_image,
        "seed": subject.seed if train.crop == "random" else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _encode(base: Base, subject: Subject, photo_digests: tuple[str, ...]) -> dict[str, Tensor]:
    import torch

    from raybooth.model.base import encode_images, encode_prompts

    train = subject.train
    means, stds = [], []
    for path, digest in zip(subject.images, photo_digests, strict=True):
        photo = load_photo(path)
        for crop in range(train.crops_per_image):
            seed = _crop_seed(subject.seed, digest, crop)
            pixels_BCHW = to_pixels(photo, train.resolution, train.crop, seed)[None]
            mean_BCHW, std_BCHW = encode_images(base, pixels_BCHW)
            means.append(mean_BCHW.cpu())
            stds.append(std_BCHW.cpu())
    tensors = {"mean": torch.cat(means), "std": torch.cat(stds)}
    for name, tensor in encode_prompts(base, [subject.instance_prompt]).items():
        tensors[PROMPT_PREFIX + name] = tensor.float().cpu()
    return tensors


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
