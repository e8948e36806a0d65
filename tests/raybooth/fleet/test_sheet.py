"""A contact sheet shows every picture with its words; a curve is thinned to its ends."""

from __future__ import annotations

import pytest
from PIL import Image

from raybooth.fleet.publishing import CURVE_POINTS, thinned
from raybooth.fleet.sheet import contact_sheet


def test_every_picture_is_on_the_sheet() -> None:
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    images = [Image.new("RGB", (64, 64), color) for color in colors]
    sheet = contact_sheet(images, ["a photo of sks dog on the beach"] * 5, columns=4)
    found = {color for _, color in sheet.getcolors(1 << 24) or []}
    assert set(colors) <= found
    assert sheet.width > 4 * 128


def test_words_make_room_for_themselves() -> None:
    image = Image.new("RGB", (128, 128))
    short = contact_sheet([image], ["dog"])
    long = contact_sheet([image], ["a photo of sks dog with very many words below it indeed"])
    assert long.height > short.height
    assert long.width == short.width
    assert contact_sheet([image], ["dog"], title="rex").height > short.height


@pytest.mark.parametrize("count", [0, 1, 2, CURVE_POINTS, CURVE_POINTS + 1, 800, 12345])
def test_a_curve_keeps_its_ends(count: int) -> None:
    curve = thinned([float(step) for step in range(1, count + 1)])
    assert len(curve) == min(count, CURVE_POINTS)
    steps = [step for step, _ in curve]
    assert steps == sorted(set(steps))
    assert all(loss == pytest.approx(step, rel=1e-5) for step, loss in curve)
    if count:
        assert (steps[0], steps[-1]) == (1, count)
