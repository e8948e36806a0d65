"""How each class is drawn: outlines in a unit square (x right, y down), painted through a pen.

`pen.paint` holds the colours of the instance: a main, b second, e emblem, h hat.
"""

import math
from collections.abc import Callable

from raybooth.pocket.palette import INK, dark, light, mix
from raybooth.pocket.pen import Pen, Points, oval

_GLASS = (184, 224, 248)


def box(x0: float, y0: float, x1: float, y1: float, r: float = 0.06) -> Points:
    """A rectangle with round corners."""
    corners = (
        (x1 - r, y1 - r, 0),
        (x0 + r, y1 - r, 90),
        (x0 + r, y0 + r, 180),
        (x1 - r, y0 + r, 270),
    )
    return [point for x, y, start in corners for point in oval(x, y, r, r, start, start + 90, 5)]


def _emblem(pen: Pen, x: float, y: float, r: float) -> None:
    color, edge = pen.paint["e"], dark(pen.paint["e"])
    match pen.instance.emblem:
        case "star":
            radii = [r * 1.1 if i % 2 == 0 else r * 0.5 for i in range(10)]
            turns = [math.pi * i / 5 for i in range(10)]
            pen.shape(
                [
                    (x + q * math.sin(t), y - q * math.cos(t))
                    for q, t in zip(radii, turns, strict=True)
                ],
                color,
                edge,
            )
        case "heart":
            turns = [2 * math.pi * i / 28 for i in range(28)]
            outline = [
                (
                    16 * math.sin(t) ** 3,
                    13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t),
                )
                for t in turns
            ]
            pen.shape([(x + r * 0.066 * u, y - r * 0.066 * v) for u, v in outline], color, edge)
        case "bolt":
            bolt = (
                (0.25, -1.1),
                (-0.75, 0.2),
                (-0.05, 0.2),
                (-0.25, 1.1),
                (0.75, -0.25),
                (0.05, -0.25),
            )
            pen.shape([(x + r * u, y + r * v) for u, v in bolt], color, edge)
        case "ring":
            pen.shape(oval(x, y, r, r), color, edge)
            pen.shape(oval(x, y, r * 0.42, r * 0.42), INK)


def _hat(pen: Pen, x: float, y: float, r: float) -> None:
    color, edge = pen.paint["h"], dark(pen.paint["h"])
    match pen.instance.hat:
        case "top":
            pen.shape(box(x - 0.7 * r, y - 1.15 * r, x + 0.7 * r, y, 0.03), color, edge)
            pen.shape(
                box(x - 1.15 * r, y - 0.16 * r, x + 1.15 * r, y + 0.18 * r, 0.03), color, edge
            )
        case "cone":
            pen.shape(
                [(x - 0.85 * r, y + 0.12 * r), (x + 0.85 * r, y + 0.12 * r), (x, y - 1.3 * r)],
                color,
                edge,
            )
            pen.shape(oval(x, y - 1.25 * r, 0.3 * r, 0.3 * r), light(color, 0.7), edge)
        case "bow":
            for side in (-1, 1):
                pen.shape(
                    [(x, y - 0.1 * r), (x + side * r, y - 0.75 * r), (x + side * r, y + 0.5 * r)],
                    color,
                    edge,
                )
            pen.shape(oval(x, y - 0.1 * r, 0.32 * r, 0.32 * r), light(color, 0.4), edge)
        case "leaf":
            pen.line([(x, y + 0.1 * r), (x, y - 0.7 * r)], edge, 0.08)
            pen.shape(oval(x - 0.52 * r, y - 0.75 * r, 0.55 * r, 0.32 * r), color, edge)
            pen.shape(oval(x + 0.52 * r, y - 0.9 * r, 0.55 * r, 0.32 * r), color, edge)


def _eye(pen: Pen, x: float, y: float, r: float) -> None:
    pen.shape(oval(x, y, r, r), (252, 252, 252), INK)
    pen.shape(oval(x + 0.25 * r, y + 0.1 * r, r * 0.58, r * 0.58), INK)


def _robot(pen: Pen) -> None:
    a, b, edge = pen.paint["a"], pen.paint["b"], pen.edge
    w, head = 0.52 + 0.14 * pen.instance.girth, 0.4 + 0.14 * pen.instance.stature
    for x in (-0.3, 0.3):
        pen.shape(box(x - 0.17, 0.55, x + 0.17, 0.98), b, edge)
    for side in (-1.0, 1.0):
        inner, outer = sorted((side * w, side * (w + 0.28)))
        pen.shape(box(inner, -0.1, outer, 0.46, 0.1), a, edge)
    pen.body(box(-w, -0.2, w, 0.68, 0.1))
    if pen.instance.hat == "none":
        pen.line([(0, -0.8), (0, -1.06)], edge, 0.08)
        pen.shape(oval(0, -1.1, 0.13, 0.13), pen.paint["e"], edge)
    pen.shape(box(-head, -0.86, head, -0.2, 0.12), a, edge)
    pen.shape(box(-head + 0.07, -0.7, head - 0.07, -0.38, 0.1), INK)
    for x in (-0.19, 0.19):
        pen.shape(oval(x, -0.54, 0.11, 0.11), (250, 250, 210))
    _emblem(pen, 0, 0.24, 0.32)
    _hat(pen, 0, -0.84, 0.42)


def _dog(pen: Pen) -> None:
    a, b, edge = pen.paint["a"], pen.paint["b"], pen.edge
    length = 0.7 + 0.1 * pen.instance.girth
    tail = [(-length + 0.1, 0.05), (-length - 0.14, -0.3), (-length - 0.04, -0.52)]
    pen.line(tail, edge, 0.25)
    pen.line(tail, a, 0.14)
    for x in (-0.55, -0.25, 0.2, 0.48):
        pen.shape(box(x - 0.13, 0.3, x + 0.13, 0.96), a, edge)
    pen.body(oval(-0.05, 0.2, length, 0.42))
    pen.shape(oval(0.52, -0.38, 0.46, 0.42), a, edge)
    pen.shape(oval(0.84, -0.24, 0.25, 0.2), light(a, 0.5), edge)
    pen.shape(oval(1.02, -0.32, 0.1, 0.09), INK)
    if pen.instance.stature < 0.5:
        pen.shape(oval(0.24, -0.26, 0.17, 0.38), b, edge)
    else:
        pen.shape([(0.12, -0.6), (0.18, -1.08), (0.5, -0.72)], b, edge)
    _eye(pen, 0.62, -0.46, 0.13)
    pen.line([(0.24, 0.0), (0.7, 0.06)], pen.paint["e"], 0.14)
    _emblem(pen, -0.2, 0.2, 0.3)
    _hat(pen, 0.54, -0.74, 0.36)


def _fish(pen: Pen) -> None:
    b, edge = pen.paint["b"], pen.edge
    h, tail = 0.54 + 0.12 * pen.instance.stature, 0.42 + 0.2 * pen.instance.girth
    pen.shape([(-0.5, 0), (-1.12, -tail), (-0.95, 0), (-1.12, tail)], b, edge)
    pen.shape([(-0.35, -h * 0.75), (0.0, -h - 0.3), (0.4, -h * 0.75)], b, edge)
    pen.shape([(-0.2, h * 0.75), (0.0, h + 0.26), (0.3, h * 0.75)], b, edge)
    pen.body(oval(0.12, 0, 0.86, h))
    _eye(pen, 0.62, -0.14, 0.16)
    pen.line([(0.9, 0.16), (0.68, 0.24)], edge, 0.07)
    _emblem(pen, 0.0, 0.03, 0.32)
    _hat(pen, 0.3, -h * 0.92, 0.36)


def _mug(pen: Pen) -> None:
    b, edge = pen.paint["b"], pen.edge
    w, h = 0.58 + 0.12 * pen.instance.girth, 0.68 + 0.14 * pen.instance.stature
    pen.line(oval(w + 0.05, 0.06, 0.3, 0.34, -100, 100), edge, 0.3)
    pen.line(oval(w + 0.05, 0.06, 0.3, 0.34, -100, 100), b, 0.18)
    pen.body([(-w, -h), (w, -h), (w * 0.92, 0.96), (-w * 0.92, 0.96)])
    pen.shape(oval(0, -h, w, 0.19), light(pen.paint["a"], 0.4), edge)
    pen.shape(oval(0, -h + 0.02, w * 0.8, 0.11), (84, 50, 30))
    _emblem(pen, 0, 0.16, 0.38)
    _hat(pen, -0.1, -h - 0.04, 0.38)


def _house(pen: Pen) -> None:
    b, edge = pen.paint["b"], pen.edge
    w, roof = 0.7 + 0.1 * pen.instance.girth, 0.66 + 0.2 * pen.instance.stature
    pen.shape([(0.34, -0.3), (0.34, -0.94), (0.6, -0.94), (0.6, -0.1)], dark(b, 0.3), edge)
    pen.body([(-w, -0.2), (w, -0.2), (w, 0.95), (-w, 0.95)])
    pen.shape([(-w - 0.2, -0.16), (0, -0.3 - roof), (w + 0.2, -0.16)], b, dark(b))
    pen.shape(box(-0.18, 0.36, 0.18, 0.95, 0.04), INK)
    for x in (-0.45, 0.45):
        pen.shape(box(x - 0.18, 0.06, x + 0.18, 0.42, 0.02), _GLASS, edge)
    _emblem(pen, 0, -0.44, 0.25)
    _hat(pen, 0, -0.3 - roof, 0.34)


def _car(pen: Pen) -> None:
    b, edge = pen.paint["b"], pen.edge
    h, k = 0.46 + 0.12 * pen.instance.stature, 0.14 * pen.instance.girth
    pen.shape(
        [(-0.76, 0.02), (-0.5, -h - 0.14), (0.3 + k, -h - 0.14), (0.66 + k * 0.5, 0.02)], b, edge
    )
    pen.shape([(-0.54, -0.02), (-0.38, -h), (-0.06, -h), (-0.06, -0.02)], _GLASS)
    pen.shape([(0.06, -0.02), (0.06, -h), (0.24 + k, -h), (0.46 + k * 0.5, -0.02)], _GLASS)
    pen.body(
        [(-1.08, 0.06), (-1.02, -0.02), (0.78, -0.02), (1.04, 0.14), (1.08, 0.62), (-1.08, 0.62)]
    )
    for x in (-0.6, 0.6):
        pen.shape(oval(x, 0.64, 0.3, 0.3), (44, 44, 50), INK)
        pen.shape(oval(x, 0.64, 0.13, 0.13), pen.paint["e"])
    pen.shape(oval(0.96, 0.22, 0.11, 0.11), (255, 240, 150), edge)
    _emblem(pen, 0.0, 0.3, 0.28)
    _hat(pen, -0.08, -h - 0.14, 0.4)


def _rocket(pen: Pen) -> None:
    b, edge = pen.paint["b"], pen.edge
    w, fin = 0.38 + 0.1 * pen.instance.girth, 0.36 + 0.2 * pen.instance.stature
    pen.shape([(-0.26, 0.66), (0, 1.14), (0.26, 0.66)], (255, 170, 40), (214, 70, 36))
    for side in (-1, 1):
        pen.shape(
            [(side * w * 0.8, 0.1), (side * (w + fin), 0.88), (side * w * 0.7, 0.72)], b, edge
        )
    sides = [(w * 0.8, 0.76), (w, 0.2), (w, -0.3), (w * 0.78, -0.6)]
    pen.body([(-x, y) for x, y in sides] + [(x, y) for x, y in reversed(sides)])
    tip = [(w * 0.8, -0.58), (w * 0.45, -0.9)]
    pen.shape(
        [(-x, y) for x, y in tip] + [(0, -1.12)] + [(x, y) for x, y in reversed(tip)], b, edge
    )
    pen.shape(oval(0, -0.3, 0.21, 0.21), _GLASS, edge)
    _emblem(pen, 0, 0.26, 0.29)
    _hat(pen, 0, -0.98, 0.32)


def _bird(pen: Pen) -> None:
    a, b, edge = pen.paint["a"], pen.paint["b"], pen.edge
    r, lift = 0.56 + 0.08 * pen.instance.girth, 0.3 * pen.instance.stature
    for x in (-0.2, 0.14):
        pen.line([(x, 0.6), (x, 0.96), (x + 0.18, 0.96)], (226, 136, 30), 0.1)
    pen.shape([(-0.4, 0.1), (-1.1, -0.26 + lift), (-1.08, 0.34)], b, edge)
    pen.body(oval(-0.02, 0.2, r + 0.1, r - 0.06))
    pen.shape([(0.72, -0.56), (1.14, -0.4), (0.72, -0.26)], (250, 166, 30), (150, 88, 20))
    pen.shape(oval(0.42, -0.42, 0.42, 0.4), a, edge)
    _eye(pen, 0.54, -0.48, 0.14)
    pen.shape([(-0.55, 0.02), (0.06, 0.02), (-0.1, 0.52), (-0.6, 0.44)], b, edge)
    _emblem(pen, 0.3, 0.34, 0.27)
    _hat(pen, 0.38, -0.76, 0.36)


def _plant(pen: Pen) -> None:
    a, b, edge = pen.paint["a"], pen.paint["b"], pen.edge
    green = mix((56, 156, 70), (132, 190, 60), pen.instance.stature)
    for turn in (-150, -30, -120, -60, -90):
        c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        blade = ((0.0, 0.0), (0.55, 0.22), (1.0, 0.0), (0.55, -0.22))
        pen.shape(
            [(c * u * 1.02 - s * v, s * u * 1.02 + c * v + 0.05) for u, v in blade],
            green,
            dark(green),
        )
    _hat(pen, 0, -0.66, 0.36)
    w = 0.52 + 0.1 * pen.instance.girth
    pen.body([(-w, 0.12), (w, 0.12), (w * 0.76, 0.98), (-w * 0.76, 0.98)])
    pen.shape(box(-w - 0.1, -0.06, w + 0.1, 0.2), b if b != a else light(a, 0.3), edge)
    _emblem(pen, 0, 0.58, 0.3)


def _backpack(pen: Pen) -> None:
    b, edge = pen.paint["b"], pen.edge
    w = 0.6 + 0.12 * pen.instance.girth
    for side in (-1.0, 1.0):
        inner, outer = sorted((side * (w - 0.06), side * (w + 0.2)))
        pen.shape(box(inner, 0.1, outer, 0.78, 0.08), b, edge)
    pen.line(oval(0, -0.84, 0.2, 0.2), edge, 0.12)
    pen.body([(-w, 0.94), (-w, -0.3), *oval(0, -0.3, w, 0.58, 180, 360, 12), (w, -0.3), (w, 0.94)])
    pen.shape(box(-w * 0.74, 0.3, w * 0.74, 0.82, 0.08), b, edge)
    pen.line([(-w * 0.5, 0.48), (w * 0.5, 0.48)], edge, 0.07)
    _emblem(pen, 0, -0.2, 0.33)
    _hat(pen, 0, -0.84, 0.36)


FIGURES: dict[str, Callable[[Pen], None]] = {
    "robot": _robot,
    "dog": _dog,
    "fish": _fish,
    "mug": _mug,
    "house": _house,
    "car": _car,
    "rocket": _rocket,
    "bird": _bird,
    "plant": _plant,
    "backpack": _backpack,
}
