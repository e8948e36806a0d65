"""JSON that says each thing once, or a sentence about why not."""

from __future__ import annotations

import json

import pytest
from fastapi import HTTPException

from raybooth_serving.wire.body import read_json


def test_what_is_said_once_is_read() -> None:
    assert read_json(b'{"a": [{"a": 1}, {"a": 2}], "b": null}') == {
        "a": [{"a": 1}, {"a": 2}],
        "b": None,
    }


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"a": 1, "b": 2, "a": 1}', "says 'a' twice"),
        (b'[{"a": {"b": 1, "b": 1}}]', "says 'b' twice"),
        (b"9" * 5000, "a number that is too long"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'"\xff"', "not UTF-8"),
    ],
)
def test_what_cannot_be_read(content: bytes, told: str) -> None:
    with pytest.raises(HTTPException) as error:
        read_json(content)
    assert error.value.status_code == 400
    assert told in error.value.detail


@pytest.mark.parametrize("content", [b"", b"{", b"{]", b'{"a"}'])
def test_what_is_not_json(content: bytes) -> None:
    with pytest.raises(json.JSONDecodeError):
        read_json(content)
