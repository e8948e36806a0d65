from __future__ import annotations

import pytest

from raybooth.near import near_names

KNOWN = [f"subject-{number:04d}" for number in range(3000)]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("subjct-1234", "subject-1234"), ("subject-2f99", "subject-2999"), ("rexx", "rex")],
)
def test_a_typo_finds_its_name_among_thousands(name: str, nearest: str) -> None:
    assert near_names(name, [*KNOWN, "rex"])[0] == nearest


def test_what_looks_like_nothing_finds_nothing() -> None:
    assert near_names("zzz", KNOWN) == near_names("rex", []) == []
