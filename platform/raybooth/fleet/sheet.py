"""A small contact sheet: pictures in a row, each with its words below."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 128
"""Pictures smaller than this are enlarged, pixel by pixel."""

MARGIN = 8
FONT_SIZE = 11
INK = (40, 40, 40)
PAPER = (255, 255, 255)


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], *, title: str = "", columns: int = 4
) -> Image.Image:
    """The pictures in rows of `columns`, captions wrapped below them."""
    shown = [_shown(image) for image in images]
    columns = max(1, min(columns, len(shown)))
    side_w = max(image.width for image in shown)
    side_h = max(image.height for image in shown)
    font = ImageFont.load_default(FONT_SIZE)
    texts = [_wrapped(caption, font, side_w) for caption in captions]
    line = FONT_SIZE + 3
    text_h = line * max((len(text) for text in texts), default=0)
    head_h = line + MARGIN if title else 0
    rows = -(-len(shown) // columns)
    width = MARGIN + columns * (side_w + MARGIN)
    height = head_h + MARGIN + rows * (side_h + text_h + MARGIN)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, font)
    for index, (image, text) in enumerate(zip(shown, texts, strict=True)):
        row, column = divmod(index, columns)
        x = MARGIN + column * (side_w + MARGIN)
        y = head_h + MARGIN + row * (side_h + text_h + MARGIN)
        sheet.paste(image, (x, y))
        for number, words in enumerate(text):
            draw.text((x, y + side_h + 2 + number * line), words, INK, font)
    return sheet


def _shown(image: Image.Image) -> Image.Image:
    factor = -(-LEAST_SIDE // min(image.size))
    if factor <= 1:
        return image.convert("RGB")
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def _wrapped(
    text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
