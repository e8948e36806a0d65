"""The paper's metrics: by hand on small numbers, and meaningful on the drawn world."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn import functional

from raybooth.encoders import Encoders, load_encoders
from raybooth.evaluation import (
    Ceiling,
    Samples,
    Scores,
    Words,
    diversity,
    mean_cosine,
    mean_pairwise_cosine,
    mean_scores,
    score,
    scores_from,
)
from raybooth.pocket import world

PLACES = ("beach", "snow", "jungle")
PROMPTS = [f"a photo of a robot {world.CONTEXTS[place]}" for place in PLACES]


@pytest.fixture(scope="module")
def pocket() -> Encoders:
    return load_encoders()


def pictures(instance: world.Instance, places: tuple[str, ...] = PLACES) -> Samples:
    """Two true renders in each place, and four of other robots for the class prompt."""
    groups = tuple(
        tuple(world.render(instance, place, f"{place}/{i}") for i in range(2)) for place in places
    )
    return Samples(groups, others(4))


def others(n: int) -> tuple[Image.Image, ...]:
    robots = [world.draw_instance(f"other/{i}", "robot") for i in range(n)]
    return tuple(world.render(one, "city", i) for i, one in enumerate(robots))


@pytest.fixture(scope="module")
def subject() -> world.Instance:
    return world.draw_instance("evaluated", "robot", fancy=True)


@pytest.fixture(scope="module")
def photos(subject: world.Instance) -> list[Image.Image]:
    return world.subject_photos(subject, 4, "evaluated")


def test_cosines_by_hand() -> None:
    rows = functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), dim=-1)
    half = 2**-0.5
    assert mean_cosine(rows[:1], rows) == pytest.approx((1 + 0 + half) / 3)
    assert mean_pairwise_cosine(rows) == pytest.approx((0 + half + half) / 3)
    assert mean_pairwise_cosine(rows[:1]) is None


def test_the_true_subject_scores_high_and_another_low(
    pocket: Encoders, subject: world.Instance, photos: list[Image.Image]
) -> None:
    true = score(pocket, photos, pictures(subject), PROMPTS)
    wrong = score(pocket, photos, pictures(world.draw_instance("wrong", "robot", True)), PROMPTS)
    assert true.dino > wrong.dino + 0.2
    assert true.clip_i > wrong.clip_i
    assert true.ceiling.dino is not None
    assert true.dino == pytest.approx(true.ceiling.dino, abs=0.15)
    assert true.pres is not None
    assert true.pres < true.dino - 0.2  # other robots are not the subject


def test_pres_rises_when_the_class_becomes_the_subject(
    pocket: Encoders, subject: world.Instance, photos: list[Image.Image]
) -> None:
    kept = pictures(subject)
    leaked = replace(kept, of_class=tuple(photos))
    before, after = (score(pocket, photos, s, PROMPTS).pres for s in (kept, leaked))
    assert before is not None
    assert after is not None
    assert after > before + 0.2


def test_clip_t_falls_when_the_place_is_wrong(
    pocket: Encoders, subject: world.Instance, photos: list[Image.Image]
) -> None:
    right = score(pocket, photos, pictures(subject), PROMPTS)
    wrong = score(pocket, photos, pictures(subject, ("city", "water", "rug")), PROMPTS)
    assert right.clip_t > wrong.clip_t + 0.1


def test_diversity_is_zero_for_one_picture_again_and_again(
    pocket: Encoders, photos: list[Image.Image]
) -> None:
    same = diversity(pocket.image, [[photos[0]] * 3])
    assert same == pytest.approx(0, abs=1e-5)
    near = diversity(pocket.image, [[photos[0], photos[0].rotate(2)]])
    far = diversity(pocket.image, [photos[:2], photos[2:]])
    assert near is not None
    assert far is not None
    assert 0 < near < far
    assert diversity(pocket.image, [photos[:1]]) is None


def test_the_identifier_stays_out_of_what_a_clip_reads() -> None:
    words = Words("sks", "robot")
    assert words.fill("a {identifier} {class_noun} at night") == "a sks robot at night"
    assert words.plain("a {identifier} {class_noun} at night") == "a robot at night"


def test_means_leave_out_what_is_missing() -> None:
    one = Scores(0.5, 0.6, 0.3, None, 0.2, Ceiling(0.7, None))
    two = Scores(0.7, 0.8, 0.1, 0.4, None, Ceiling(0.9, None))
    mean = mean_scores([one, two])
    assert mean.dino == pytest.approx(0.6)
    assert (mean.pres, mean.div) == (0.4, 0.2)
    assert mean.ceiling == Ceiling(pytest.approx(0.8), None)
    assert scores_from(mean.as_dict()) == mean
