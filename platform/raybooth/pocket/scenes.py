"""The ten places: few, large, steady elements on a 256x256 canvas with the ground at 158."""

import random
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

from raybooth.pocket.palette import Color, dark, light
from raybooth.pocket.pen import CANVAS, Point

_GROUND = 158


class Scene:
    """A canvas for backgrounds: everything moves together by a little, and tones vary a little."""

    def __init__(self, canvas: Image.Image, rng: random.Random) -> None:
        self._draw = ImageDraw.Draw(canvas)
        self._canvas = canvas
        self._dx, self._dy = rng.uniform(-10, 10), rng.uniform(-6, 6)
        self._tone = tuple(rng.uniform(-6, 6) for _ in range(3))

    def sky(self, top: Color, bottom: Color) -> None:
        """A vertical gradient over the whole canvas."""
        ends = Image.new("RGB", (1, 2))
        ends.putpixel((0, 0), self._toned(top))
        ends.putpixel((0, 1), self._toned(bottom))
        self._canvas.paste(ends.resize(self._canvas.size, Image.Resampling.BILINEAR), (0, 0))

    def band(self, y0: float, y1: float, color: Color) -> None:
        """A band over the whole width."""
        low = y1 if y1 >= CANVAS else y1 + self._dy
        self._draw.rectangle((0, y0 + self._dy, CANVAS, low), fill=self._toned(color))

    def band_between(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        """A rectangle."""
        self._draw.rectangle(
            (x0 + self._dx, y0 + self._dy, x1 + self._dx, y1 + self._dy), fill=self._toned(color)
        )

    def oval(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        """An ellipse within these bounds."""
        self._draw.ellipse(
            (x0 + self._dx, y0 + self._dy, x1 + self._dx, y1 + self._dy), fill=self._toned(color)
        )

    def disc(self, x: float, y: float, r: float, color: Color) -> None:
        """A circle about a point."""
        self.oval(x - r, y - r, x + r, y + r, color)

    def line(self, points: Sequence[Point], color: Color, width: int) -> None:
        """A line through these points."""
        self._draw.line(
            [(x + self._dx, y + self._dy) for x, y in points],
            self._toned(color),
            width,
            joint="curve",
        )

    def polygon(self, points: Sequence[Point], color: Color) -> None:
        """A filled polygon."""
        self._draw.polygon(
            [(x + self._dx, y + self._dy) for x, y in points], fill=self._toned(color)
        )

    def peak(self, x: float, y: float, half_width: float, height: float, color: Color) -> None:
        """A triangle that stands on y."""
        self.polygon([(x - half_width, y), (x + half_width, y), (x, y - height)], color)

    def leaf(self, x: float, y: float, dx: float, dy: float, color: Color) -> None:
        """A pointed leaf about a point, from one end to the other along (dx, dy)."""
        self.polygon(
            [
                (x - dx, y - dy),
                (x - dy * 0.45, y + dx * 0.45),
                (x + dx, y + dy),
                (x + dy * 0.45, y - dx * 0.45),
            ],
            color,
        )

    def _toned(self, color: Color) -> Color:
        r, g, b = (max(0, min(255, round(c + t))) for c, t in zip(color, self._tone, strict=True))
        return r, g, b


def _beach(s: Scene) -> None:
    s.sky((98, 186, 246), (190, 230, 250))
    s.band(_GROUND - 40, _GROUND, (34, 136, 200))
    s.band(_GROUND, 256, (246, 218, 148))
    s.band(_GROUND, _GROUND + 8, (252, 250, 240))
    s.disc(214, 40, 24, (255, 236, 110))
    s.line([(26, _GROUND + 24), (34, 78)], (132, 90, 48), 14)
    for dx, dy in ((-46, 14), (-34, -22), (4, -34), (44, -18), (48, 18)):
        s.line([(34, 78), (34 + dx, 78 + dy)], (44, 146, 62), 14)


def _snow(s: Scene) -> None:
    s.sky((168, 198, 230), (222, 234, 246))
    for x, h in ((30, 120), (226, 132), (84, 84)):
        s.peak(x, _GROUND + 6, 34, h, (44, 110, 92))
        s.peak(x, _GROUND + 6 - h * 0.55, 17, h * 0.5, (250, 252, 255))
    s.band(_GROUND, 256, (246, 249, 254))
    for x, y in (
        (20, 30),
        (66, 52),
        (120, 22),
        (170, 48),
        (204, 22),
        (240, 70),
        (16, 200),
        (236, 214),
        (130, 240),
    ):
        s.disc(x, y, 7, (255, 255, 255))


def _jungle(s: Scene) -> None:
    s.sky((26, 92, 52), (60, 136, 62))
    for x in (36, 218):
        s.band_between(x - 12, 0, x + 12, _GROUND + 20, (92, 66, 40))
    s.band(_GROUND + 12, 256, (58, 96, 40))
    for x, y, dx, dy, tone in (
        (14, 44, 44, 18, 0),
        (84, 18, -42, 22, 1),
        (150, 14, 44, 20, 0),
        (238, 40, -44, 20, 1),
        (14, 130, 30, 32, 1),
        (242, 128, -30, 34, 0),
        (20, 226, 30, -34, 0),
        (70, 250, 22, -30, 1),
        (236, 226, -30, -34, 1),
        (180, 250, -22, -30, 0),
    ):
        s.leaf(x, y, dx, dy, ((52, 160, 74), (124, 194, 74))[tone])


def _night(s: Scene) -> None:
    s.sky((14, 16, 60), (48, 50, 116))
    s.disc(212, 44, 26, (252, 242, 190))
    s.disc(224, 36, 22, (18, 20, 66))
    for x, y in ((24, 28), (64, 64), (104, 22), (150, 36), (32, 108), (236, 112), (176, 14)):
        s.disc(x, y, 5, (254, 250, 220))
    s.band(_GROUND, 256, (34, 42, 66))


def _city(s: Scene) -> None:
    s.sky((150, 184, 214), (214, 222, 230))
    for x, w, h, color in (
        (-6, 64, 112, (112, 118, 136)),
        (58, 60, 138, (150, 126, 116)),
        (118, 64, 100, (94, 106, 130)),
        (182, 80, 130, (160, 152, 144)),
    ):
        s.band_between(x, _GROUND - h, x + w - 4, _GROUND, color)
        for wx in (x + 12, x + 36):
            for wy in range(_GROUND - h + 14, _GROUND - 20, 32):
                s.band_between(wx, wy, wx + 12, wy + 16, (252, 232, 140))
    s.band(_GROUND, 256, (92, 94, 102))
    s.band(_GROUND, _GROUND + 14, (182, 182, 184))
    for x in (0, 96, 192):
        s.band_between(x, 232, x + 52, 242, (244, 240, 214))


def _wood(s: Scene) -> None:
    s.sky((238, 228, 206), (238, 228, 206))
    s.band(118, 256, (194, 132, 74))
    s.band(106, 120, (252, 248, 240))
    for y, joint in ((152, 70), (192, 190), (238, 110)):
        s.line([(0, y), (256, y)], (128, 82, 44), 6)
        s.line([(joint, y), (joint, y - 36)], (128, 82, 44), 6)


def _fabric(s: Scene) -> None:
    pink: Color = (248, 158, 194)
    s.sky(pink, pink)
    for x in (-60, 32, 124, 216):
        s.polygon([(x + 40, 0), (x + 82, 0), (x + 42, 256), (x, 256)], light(pink, 0.42))
    for x in (-14, 78, 170):
        s.polygon([(x + 40, 0), (x + 52, 0), (x + 12, 256), (x, 256)], dark(pink, 0.18))


def _rug(s: Scene) -> None:
    blue: Color = (38, 78, 170)
    s.sky((214, 194, 170), (214, 194, 170))
    s.band(56, 256, blue)
    s.band(64, 78, (236, 216, 150))
    s.band(240, 256, (236, 216, 150))
    for x in (24, 76, 128, 180, 232):
        s.polygon([(x - 18, 106), (x, 88), (x + 18, 106), (x, 124)], light(blue, 0.45))
    for x in (22, 234):
        for y in (160, 210):
            s.polygon([(x - 16, y), (x, y - 18), (x + 16, y), (x, y + 18)], light(blue, 0.45))


def _desert(s: Scene) -> None:
    s.sky((250, 188, 108), (254, 230, 170))
    s.disc(48, 44, 26, (255, 248, 200))
    s.oval(-60, _GROUND - 34, 170, 300, (230, 158, 88))
    s.oval(110, _GROUND - 22, 340, 300, (216, 142, 74))
    s.band(_GROUND + 24, 256, (222, 150, 80))
    for x0, y0, x1, y1 in (
        (214, 82, 234, 190),
        (192, 104, 206, 138),
        (192, 128, 222, 142),
        (242, 92, 256, 126),
        (226, 116, 250, 130),
    ):
        s.band_between(x0, y0, x1, y1, (60, 136, 70))


def _water(s: Scene) -> None:
    s.sky((64, 192, 208), (14, 84, 146))
    s.band(222, 256, (204, 188, 134))
    for x in (22, 44, 218, 240):
        s.line([(x, 256), (x + 10, 220), (x - 8, 186), (x + 6, 150)], (30, 142, 88), 11)
    for x, y, r in ((36, 40, 12), (214, 36, 15), (234, 92, 10), (22, 104, 9), (120, 16, 9)):
        s.disc(x, y, r, (216, 246, 252))
        s.disc(x, y, r - 4, (70, 180, 204))


SCENES: dict[str, Callable[[Scene], None]] = {
    "beach": _beach,
    "snow": _snow,
    "jungle": _jungle,
    "night": _night,
    "city": _city,
    "wood": _wood,
    "fabric": _fabric,
    "rug": _rug,
    "desert": _desert,
    "water": _water,
}
