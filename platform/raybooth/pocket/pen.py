"""What pictures are drawn with: an individual, and the pen that draws in its colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from raybooth.pocket.palette import Color, dark

Point = tuple[float, float]
Points = list[Point]

SIZE = 64
"""Pixels of a picture's side."""
CANVAS = 4 * SIZE
"""Pixels of the side that it is drawn at."""


@dataclass(frozen=True)
class Instance:
    """One individual of a class: colours a (main), b, e (emblem), h (hat); sizes in [0, 1]."""

    class_noun: str
    a: str
    b: str
    e: str
    h: str
    pattern: str
    emblem: str
    hat: str
    girth: float
    stature: float


class Pen:
    """Draws outlines of an instance's unit square onto the canvas, in that instance's colours."""

    def __init__(
        self,
        canvas: Image.Image,
        x: float,
        y: float,
        scale: float,
        turn: float,
        instance: Instance,
        paint: dict[str, Color],
    ) -> None:
        self.instance = instance
        self.paint = paint
        self.edge = dark(paint["a"]) if instance.a != "black" else (8, 8, 12)
        self._canvas, self._draw = canvas, ImageDraw.Draw(canvas)
        self._x, self._y, self._scale = x, y, scale
        self._cos, self._sin = math.cos(turn), math.sin(turn)

    def shape(self, points: Sequence[Point], fill: Color, edge: Color | None = None) -> None:
        """A filled outline, with a thick edge if one is given."""
        placed = [self._place(point) for point in points]
        self._draw.polygon(placed, fill=fill)
        if edge is not None:
            self._draw.line([*placed, placed[0], placed[1]], fill=edge, width=7, joint="curve")

    def line(self, points: Sequence[Point], fill: Color, width: float) -> None:
        """A line whose width is in units of the square."""
        placed = [self._place(point) for point in points]
        self._draw.line(placed, fill=fill, width=max(2, round(width * self._scale)), joint="curve")

    def body(self, points: Sequence[Point]) -> None:
        """The main outline, in colour a with the instance's pattern in colour b."""
        self.shape(points, self.paint["a"])
        marks = self._marks()
        if marks:
            inside = Image.new("L", self._canvas.size, 0)
            ImageDraw.Draw(inside).polygon([self._place(point) for point in points], fill=255)
            painted = self._canvas.copy()
            for mark in marks:
                ImageDraw.Draw(painted).polygon(
                    [self._place(point) for point in mark], fill=self.paint["b"]
                )
            self._canvas.paste(painted, (0, 0), inside)
        placed = [self._place(point) for point in points]
        self._draw.line([*placed, placed[0], placed[1]], fill=self.edge, width=7, joint="curve")

    def _marks(self) -> list[Sequence[Point]]:
        match self.instance.pattern:
            case "stripes":
                return [
                    [(-2, y), (2, y), (2, y + 0.17), (-2, y + 0.17)]
                    for y in (-0.98, -0.52, -0.06, 0.4, 0.86)
                ]
            case "bars":
                return [
                    [(x, -2), (x + 0.17, -2), (x + 0.17, 2), (x, 2)]
                    for x in (-1.005, -0.545, -0.085, 0.375, 0.835)
                ]
            case "dots":
                columns = [
                    (i * 0.44 + (0.22 if j % 2 else 0.0), j * 0.36)
                    for i in range(-3, 3)
                    for j in range(-3, 4)
                ]
                return [oval(x, y, 0.13, 0.13, n=14) for x, y in columns]
        return []

    def _place(self, point: Point) -> Point:
        x, y = point[0] * self._scale, point[1] * self._scale
        return self._x + x * self._cos - y * self._sin, self._y + x * self._sin + y * self._cos


def oval(
    x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360, n: int = 28
) -> Points:
    """The arc of an ellipse from start to stop, in degrees."""
    turns = [math.radians(start + (stop - start) * i / n) for i in range(n + 1)]
    return [(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turns]
