"""Photos kept back for validation must leave some to train on (no torch)."""

from __future__ import annotations

from raybooth.errors import SubjectError
from raybooth.subject import Subject


def held_out_problem(subject: Subject) -> SubjectError | None:
    """Why no photo would be left to train on."""
    count = subject.train.validation.held_out_images
    if count == 0 or count < len(subject.images):
        return None
    what = f"subject {subject.subject_id!r}: validation.held_out_images leaves nothing to train on"
    return SubjectError(what, f"{count} of {len(subject.images)} photos", "hold out fewer")
