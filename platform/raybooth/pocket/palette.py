"""The ten colours that captions name, and how to shade them."""

Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (218, 40, 44),
    "orange": (250, 140, 24),
    "yellow": (252, 216, 50),
    "green": (48, 172, 76),
    "blue": (40, 96, 224),
    "purple": (136, 62, 196),
    "pink": (252, 128, 186),
    "brown": (130, 80, 42),
    "white": (246, 246, 242),
    "black": (46, 46, 54),
}
INK: Color = (28, 26, 36)


def mix(one: Color, other: Color, share: float) -> Color:
    """(1 - share) * one + share * other."""
    r, g, b = (int(p * (1 - share) + q * share) for p, q in zip(one, other, strict=True))
    return r, g, b


def dark(color: Color, share: float = 0.62) -> Color:
    """The colour towards ink."""
    return mix(color, (16, 14, 24), share)


def light(color: Color, share: float = 0.45) -> Color:
    """The colour towards white."""
    return mix(color, (255, 255, 255), share)
