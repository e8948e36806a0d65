"""Errors say three facts, keep them across processes, and have stable codes."""

from __future__ import annotations

import pickle

import pytest

from raybooth import errors


def error_classes() -> list[type[errors.RayBoothError]]:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return [kind for kind in found if issubclass(kind, errors.RayBoothError)]


@pytest.mark.parametrize("kind", error_classes())
def test_every_error_survives_pickling(kind: type[errors.RayBoothError]) -> None:
    if kind is errors.InputProblems:
        original: errors.RayBoothError = kind("f.yaml", [errors.ConfigError("a", "b", "c")])
    else:
        original = kind("what", "found", "do")
    copy = pickle.loads(pickle.dumps(original))
    assert type(copy) is kind
    assert str(copy) == str(original)
    assert (copy.what, copy.found, copy.do) == (original.what, original.found, original.do)
    assert kind.code
    assert kind.exit_code in (1, 2)


def test_an_error_reads_as_one_sentence() -> None:
    error = errors.SubjectError("rex needs 3 photos", "1", "add photos")
    assert str(error) == "rex needs 3 photos: found 1; add photos"
