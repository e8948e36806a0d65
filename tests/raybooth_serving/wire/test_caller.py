"""How long a caller waits, by what it says."""

from __future__ import annotations

import pytest

from raybooth_serving.wire.caller import patience_s


@pytest.mark.parametrize(
    ("asked_s", "sdk", "expected"),
    [
        (None, None, None),
        (20.0, None, 19.0),
        (2.0, "600", 1.8),
        (None, "600", 599.0),
        (None, "30.0", 29.0),
        (100.0, "50", 49.0),
        (None, "None", None),
        (None, "nan", None),
        (None, "-1", None),
        (None, "inf", None),
        (5.0, "soon", 4.5),
    ],
)
def test_patience(asked_s: float | None, sdk: str | None, expected: float | None) -> None:
    assert patience_s(asked_s, sdk) == pytest.approx(expected)
