"""Subject fidelity, prompt fidelity, prior preservation, diversity (Ruiz et al. 2023, section 4).

dino, clip_i  mean cosine of every sample with every instance image (image encoder [CLS], CLIP)
clip_t        mean cosine of every sample with its own prompt, the identifier left out (CLIP)
pres          mean cosine of pictures of the class prompt with the instance images: LOWER is better
div           mean distance of two samples of one prompt: higher is more diverse
ceiling       mean cosine of two different instance images; a score above it means copying

`div` differs from the paper, which uses LPIPS: it is LPIPS's own form (Zhang et al. 2018, equation
1, all channel weights one, half of it, meaned over layers) on the image encoder's patch tokens, so
it compares subjects of one encoder and is not comparable with published figures.

N instance images, M samples, P prior pictures, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from raybooth.encoders import Encoders, ImageEncoder
from raybooth.model.sampler import SampleRequest, generate

if TYPE_CHECKING:
    from raybooth.model.bank import Bank
    from raybooth.model.base import Base
    from raybooth.model.text_adapter import TextAdapter


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What two photos of the subject itself reach; None where there is one photo only."""

    dino: float | None
    clip_i: float | None


@dataclass(frozen=True, slots=True)
class Scores:
    """The paper's metrics of one subject, or their means over subjects."""

    dino: float
    clip_i: float
    clip_t: float
    pres: float | None
    """None where no picture of the class prompt was drawn."""
    div: float | None
    """None where each prompt has one sample."""
    ceiling: Ceiling

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Words:
    """How a subject is called in prompts."""

    identifier: str
    class_noun: str

    def fill(self, template: str) -> str:
        """The prompt that the base is given."""
        return template.format(identifier=self.identifier, class_noun=self.class_noun)

    def plain(self, template: str) -> str:
        """The prompt without the identifier, which means nothing to a CLIP."""
        return " ".join(template.format(identifier="", class_noun=self.class_noun).split())


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is drawn of a subject, and how."""

    prompts: tuple[str, ...]
    """Templates with {identifier} and {class_noun}."""
    class_prompt: str
    """A template; its pictures are what `pres` judges."""
    images_per_prompt: int = 4
    class_images: int = 16
    seed: int = 0
    solver: str = "dpmpp2m"
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    side: int | None = None
    """Pixels; none means the base's own resolution."""
    zero_terminal_snr: bool = False
    """As the model was trained."""

    @property
    def num_pictures(self) -> int:
        """All that are drawn of one subject."""
        return len(self.prompts) * self.images_per_prompt + self.class_images


@dataclass(frozen=True, slots=True)
class Samples:
    """Pictures of one subject: some for each prompt, some for the class prompt."""

    by_prompt: tuple[tuple[Image.Image, ...], ...]
    of_class: tuple[Image.Image, ...]


def draw(
    base: Base,
    bank: Bank | None,
    slot: int,
    words: Words,
    sampling: Sampling,
    text: TextAdapter | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Samples:
    """All pictures in mixed batches: image i of prompt p has seed + p * images_per_prompt + i.

    `on_step` is that of `generate`.
    """
    prompts = [words.fill(t) for t in sampling.prompts for _ in range(sampling.images_per_prompt)]
    prompts += [words.fill(sampling.class_prompt)] * sampling.class_images
    requests = [
        SampleRequest(
            prompt=prompt,
            seed=sampling.seed + place,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            solver=sampling.solver,
            height=sampling.side,
            width=sampling.side,
            slot=slot,
            zero_terminal_snr=sampling.zero_terminal_snr,
            text=text,
        )
        for place, prompt in enumerate(prompts)
    ]
    images = generate(base, bank, requests, on_step=on_step)
    each = sampling.images_per_prompt
    cut = each * len(sampling.prompts)
    return Samples(
        tuple(tuple(images[first : first + each]) for first in range(0, cut, each)),
        tuple(images[cut:]),
    )


def score(
    encoders: Encoders,
    instance_images: Sequence[Image.Image],
    samples: Samples,
    prompts: Sequence[str],
) -> Scores:
    """The metrics of one subject; `prompts` are the plain ones, in the samples' order."""
    image, clip = encoders.image, encoders.clip
    flat = [one for group in samples.by_prompt for one in group]
    real_ND, real_clip_ND = image.embed(instance_images), clip.embed(instance_images)
    sample_clip_MD = clip.embed(flat)
    said_MD = clip.read(prompts).repeat_interleave(
        torch.tensor([len(group) for group in samples.by_prompt]), dim=0
    )
    pres = None
    if samples.of_class:
        pres = mean_cosine(image.embed(samples.of_class), real_ND)
    return Scores(
        dino=mean_cosine(image.embed(flat), real_ND),
        clip_i=mean_cosine(sample_clip_MD, real_clip_ND),
        clip_t=float((sample_clip_MD * said_MD).sum(1).mean()),
        pres=pres,
        div=diversity(image, samples.by_prompt),
        ceiling=Ceiling(mean_pairwise_cosine(real_ND), mean_pairwise_cosine(real_clip_ND)),
    )


def mean_cosine(one_MD: Tensor, other_ND: Tensor) -> float:
    """Mean of all M x N cosines of unit rows."""
    return float((one_MD @ other_ND.T).mean())


def mean_pairwise_cosine(unit_ND: Tensor) -> float | None:
    """Mean cosine of two different rows; None for one row."""
    N = len(unit_ND)
    if N < 2:
        return None
    cosine_NN = unit_ND @ unit_ND.T
    return float((cosine_NN.sum() - cosine_NN.diagonal().sum()) / (N * (N - 1)))


def diversity(encoder: ImageEncoder, groups: Sequence[Sequence[Image.Image]]) -> float | None:
    """Mean over prompts of the mean distance of two pictures; None where no prompt has two."""
    distances = []
    for group in groups:
        if len(group) < 2:
            continue
        patches_NLTD = encoder.patches(group)
        cosine_NN = torch.einsum("iltd,jltd->ij", patches_NLTD, patches_NLTD)
        cosine_NN /= patches_NLTD.shape[1] * patches_NLTD.shape[2]
        first, second = torch.triu_indices(len(group), len(group), offset=1)
        distances.append(float((1 - cosine_NN[first, second]).mean()))
    return math.fsum(distances) / len(distances) if distances else None


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Each metric's mean over subjects, those that lack it left out."""
    return Scores(
        **{
            field.name: _mean([getattr(one, field.name) for one in scores])
            for field in fields(Scores)
            if field.name != "ceiling"
        },
        ceiling=Ceiling(
            _mean([one.ceiling.dino for one in scores]),
            _mean([one.ceiling.clip_i for one in scores]),
        ),
    )


def scores_from(values: Mapping[str, Any]) -> Scores:
    """What `as_dict` wrote."""
    return Scores(**{**values, "ceiling": Ceiling(**values["ceiling"])})


def _mean(values: Sequence[float | None]) -> Any:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
