"""How well the two evaluators judge true renders of individuals that no corpus holds.

N pictures, I individuals, D features.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from raybooth.pocket import world
from raybooth.pocket.corpus import pixels
from raybooth.pocket.palette import COLORS
from raybooth.pocket.vae import as_tensor

_TEST_SEED = 57_000_000
_PHOTOS = 4


@torch.no_grad()
def embedder_figures(embedder: Any, individuals_a_class: int = 12) -> dict[str, float]:
    """Mean cosines of two photos, and how often the same individual is the nearer one (AUC).

    Every photo of an individual is in another place; others are of the same class.
    """
    same, other = [], []
    for class_noun in world.CLASSES:
        photos: list[Any] = []
        for i in range(individuals_a_class):
            instance = world.draw_instance(f"held out/{i}", class_noun, fancy=i % 2 == 0)
            photos += world.subject_photos(instance, _PHOTOS, f"held out/{i}")
        embeds_ND = _embed(embedder, photos)
        cosine_NN = embeds_ND @ embeds_ND.T
        who_N = torch.arange(len(photos)) // _PHOTOS
        same_NN = who_N[:, None] == who_N[None]
        itself_NN = torch.eye(len(photos), dtype=torch.bool)
        same.append(cosine_NN[same_NN & ~itself_NN])
        other.append(cosine_NN[~same_NN])
    same_P, other_P = torch.cat(same), torch.cat(other)
    return {
        "same_cosine": round(float(same_P.mean()), 4),
        "other_cosine": round(float(other_P.mean()), 4),
        "auc": round(auc(same_P, other_P), 4),
    }


@torch.no_grad()
def clip_figures(clip: Any, tokenizer: Any, pictures: int = 400) -> dict[str, float]:
    """How often the right words of ten are the nearest: class nouns, contexts, colours."""
    examples = [world.example(_TEST_SEED + i) for i in range(pictures)]
    images_ND = _normal(
        clip.get_image_features(pixel_values=_pixels([image for image, *_ in examples]))
    )
    asked = {
        "class": [f"a photo of a {noun}" for noun in world.CLASSES],
        "context": list(world.CONTEXTS.values()),
    }
    truth = {
        "class": [world.CLASSES.index(one.class_noun) for _, _, one, _ in examples],
        "context": [list(world.CONTEXTS).index(place) for *_, place in examples],
    }
    figures = {
        name: _share_right(images_ND @ _said(clip, tokenizer, asked[name]).T, truth[name])
        for name in asked
    }
    right = 0.0
    for noun in world.CLASSES:
        places = [i for i, (_, _, one, _) in enumerate(examples) if one.class_noun == noun]
        words_KD = _said(clip, tokenizer, [f"a {colour} {noun}" for colour in COLORS])
        colours = [list(COLORS).index(examples[i][2].a) for i in places]
        right += len(places) * _share_right(images_ND[places] @ words_KD.T, colours)
    figures["colour"] = right / pictures
    return {name: round(value, 4) for name, value in figures.items()}


def auc(same_P: Tensor, other_Q: Tensor) -> float:
    """P(a value of `same` > a value of `other`), ties counting half (Mann and Whitney 1947)."""
    sorted_Q = other_Q.sort().values
    below_P = torch.searchsorted(sorted_Q, same_P, right=False)
    upto_P = torch.searchsorted(sorted_Q, same_P, right=True)
    return float((below_P + upto_P).double().mean() / (2 * len(other_Q)))


def _embed(embedder: Any, images: list[Any]) -> Tensor:
    return functional.normalize(
        embedder(pixel_values=_pixels(images)).last_hidden_state[:, 0], dim=-1
    )


def _said(clip: Any, tokenizer: Any, prompts: list[str]) -> Tensor:
    ids = tokenizer(prompts, padding=True, return_tensors="pt").input_ids
    return _normal(clip.get_text_features(input_ids=ids))


def _normal(features: Any) -> Tensor:
    return functional.normalize(features.pooler_output, dim=-1)


def _pixels(images: list[Any]) -> Tensor:
    return as_tensor(np.stack([pixels(image) for image in images]))


def _share_right(scores_NK: Tensor, truth: list[int]) -> float:
    return float((scores_NK.argmax(1) == torch.tensor(truth)).float().mean())
