"""What is wrong with a subject's photos and with what lies beside them (no weights are loaded)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raybooth.config.adapter import countable
from raybooth.errors import InputError, SubjectError
from raybooth.fleet.memory import BaseShape
from raybooth.sidecar import caption_file, mask_file
from raybooth.subject import Subject

if TYPE_CHECKING:
    from raybooth.data.framing import Size


def photo_problems(subject: Subject, shape: BaseShape | None) -> Sequence[InputError]:
    """Photos and masks that cannot be trained on; `shape` tells the buckets of the base."""
    from raybooth.data.framing import bucket_sizes
    from raybooth.data.images import check_photos

    train = subject.train
    sizes: Sequence[Size] = ()
    if shape is not None and train.photos.fit == "buckets":
        sizes = bucket_sizes(train.resolution, shape.least_side)
    return check_photos(
        subject.images,
        resolution=train.resolution,
        min_images=train.min_images,
        subject_id=subject.subject_id,
        sizes=sizes,
        masks=train.photos.masks,
    )


def caption_problems(subject: Subject, tokenizer: Any) -> list[InputError]:
    """Captions that cannot be read, or that the text encoder would cut."""
    from raybooth.model.tokens import cut_tokens

    whose = f"subject {subject.subject_id!r}: "
    problems: list[InputError] = []
    for image in subject.images if subject.train.photos.captions else ():
        try:
            words = subject.caption(image)
        except SubjectError as error:
            problems.append(SubjectError(whose + error.what, error.found, error.do))
            continue
        words = countable(words, subject.identifier, subject.train.adapter.identifier_tokens)
        if caption_file(image).exists() and (cut := cut_tokens(tokenizer, words)):
            found = f"{len(cut)} tokens that would be cut: {' '.join(cut)}"
            what = f"{whose}the caption {caption_file(image)} is too long"
            problems.append(SubjectError(what, found, "shorten it"))
    return problems


def sidecar_problems(subject: Subject) -> list[InputError]:
    """Options that find no file beside any photo."""
    return [
        SubjectError(
            f"subject {subject.subject_id!r}: photos.{option} has no effect",
            f"no photo has a {name}",
            "write one, or remove the option",
        )
        for option, name, is_read, is_there in _sidecars(subject)
        if is_read and not is_there
    ]


def sidecar_warnings(subject: Subject) -> list[str]:
    """Files beside the photos that nobody reads."""
    return [
        f"subject {subject.subject_id!r}: {name} lies beside a photo but is not read; "
        f"set photos.{option}: true to read it"
        for option, name, is_read, is_there in _sidecars(subject)
        if is_there and not is_read
    ]


def _sidecars(subject: Subject) -> list[tuple[str, str, bool, bool]]:
    """(option, kind of file, is it read, is one there)."""
    photos, images = subject.train.photos, subject.images
    captions = any(caption_file(image).exists() for image in images)
    masks = any(mask_file(image).exists() for image in images)
    return [
        ("captions", "caption (<photo>.txt)", photos.captions, captions),
        ("masks", "mask (<photo>.mask.png)", photos.masks, masks),
    ]
