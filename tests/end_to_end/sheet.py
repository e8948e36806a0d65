"""Contact sheets: rows of labelled pictures, pixel for pixel enlarged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 168
GAP = 10
LABEL = 24
INK, PALE, PAPER, RULE = (34, 36, 46), (112, 116, 130), (252, 251, 248), (222, 219, 210)


@dataclass(frozen=True, slots=True)
class SheetRow:
    """One line of the sheet: a title above, a quad of photos, then pictures with captions."""

    title: str
    photos: Sequence[Image.Image]
    pictures: Sequence[tuple[str, Image.Image]]


def draw_sheet(
    title: str, subtitle: str, sections: Sequence[tuple[str, Sequence[SheetRow]]]
) -> Image.Image:
    """All rows under their section headings."""
    columns = 1 + max(len(row.pictures) for _, rows in sections for row in rows)
    width = GAP + columns * (CELL + GAP)
    row_height = LABEL + CELL + LABEL + GAP
    num_rows = sum(len(rows) for _, rows in sections)
    height = 92 + len(sections) * 48 + num_rows * row_height
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 14), title, INK, _font(30))
    pen.text((GAP, 54), subtitle, PALE, _font(16))
    y = 92
    for heading, rows in sections:
        pen.line([(GAP, y), (width - GAP, y)], RULE, 2)
        pen.text((GAP, y + 12), heading, INK, _font(19))
        y += 48
        for row in rows:
            pen.text((GAP, y), row.title, INK, _font(15))
            top = y + LABEL
            sheet.paste(_quad(row.photos), (GAP, top))
            pen.text((GAP, top + CELL + 3), "the photos", PALE, _font(13))
            for column, (caption, picture) in enumerate(row.pictures, start=1):
                x = GAP + column * (CELL + GAP)
                sheet.paste(_enlarged(picture, CELL), (x, top))
                pen.text((x, top + CELL + 3), caption, PALE, _font(13))
            y += row_height
    return sheet


def _quad(photos: Sequence[Image.Image]) -> Image.Image:
    side = (CELL - 4) // 2
    quad = Image.new("RGB", (CELL, CELL), PAPER)
    for index, photo in enumerate(photos[:4]):
        place = ((index % 2) * (side + 4), (index // 2) * (side + 4))
        quad.paste(_enlarged(photo, side), place)
    return quad


def _enlarged(picture: Image.Image, side: int) -> Image.Image:
    return picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
