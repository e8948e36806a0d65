"""The drawn world: a pure function of seeds, complete, and honest in its captions."""

import pytest

from raybooth.pocket import world


def test_every_class_is_drawn_in_every_context() -> None:
    pictures = set()
    for noun in world.CLASSES:
        instance = world.draw_instance(1, noun, fancy=True)
        for context in world.CONTEXTS:
            picture = world.render(instance, context, 1)
            assert picture.size == (64, 64)
            assert picture.mode == "RGB"
            pictures.add(picture.tobytes())
    assert len(pictures) == len(world.CLASSES) * len(world.CONTEXTS) >= 100


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others() -> None:
    one, words, instance, context = world.example(5)
    again, same_words, same_instance, same_context = world.example(5)
    other = world.example(6)[0]
    assert one.tobytes() == again.tobytes() != other.tobytes()
    assert (words, instance, context) == (same_words, same_instance, same_context)


def test_a_caption_names_only_class_colour_and_context() -> None:
    for seed in range(400):
        _, words, instance, context = world.example(seed)
        rest = words
        for phrase in (world.CONTEXTS[context], *world.SYNONYMS[context]):
            rest = rest.replace(phrase, "")
        told = set(rest.split()) - {*" ".join(world.OPENINGS).split(), *world.RARE_WORDS}
        assert told <= {instance.class_noun, instance.a}


def test_rare_words_are_rare_and_tied_to_nothing() -> None:
    seeds = range(3000)
    captions = [world.caption(world.draw_instance(s), "beach", s).split() for s in seeds]
    with_rare = [words for words in captions if set(words) & set(world.RARE_WORDS)]
    assert 0.04 < len(with_rare) / len(captions) < 0.08


def test_a_fancy_instance_is_more_than_words_can_say() -> None:
    for seed in range(60):
        one = world.draw_instance(seed, fancy=True)
        assert "none" not in (one.emblem, one.hat)
        assert one.pattern != "plain"
        assert len({one.a, one.b, one.e}) == 3


def test_photos_of_a_subject_differ_in_context_but_not_in_who() -> None:
    subject = world.draw_instance("ours", "robot", fancy=True)
    photos = world.subject_photos(subject, 5, 0)
    assert len({photo.tobytes() for photo in photos}) == 5
    assert [p.tobytes() for p in photos] == [
        p.tobytes() for p in world.subject_photos(subject, 5, 0)
    ]


def test_an_unknown_class_or_context_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="robot"):
        world.draw_instance(0, "unicorn")
    with pytest.raises(ValueError, match="beach"):
        world.render(world.draw_instance(0), "moon", 0)
