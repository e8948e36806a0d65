"""A small drawn world: 64x64 pictures of toy-like things in places, each a pure function of a seed.

Captions name the class noun, the main colour and the context. Everything else about an `Instance`
(second colour, pattern, emblem, hat, proportions) stays unsaid: words cannot describe a subject.

Pictures are drawn at 256x256 and reduced by 4.
"""

import math
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw

from raybooth.pocket.figures import FIGURES
from raybooth.pocket.palette import COLORS, INK, Color, mix
from raybooth.pocket.pen import CANVAS, Pen
from raybooth.pocket.pen import SIZE as SIZE
from raybooth.pocket.pen import Instance as Instance
from raybooth.pocket.scenes import SCENES, Scene

CLASSES = ("robot", "dog", "fish", "mug", "house", "car", "rocket", "bird", "plant", "backpack")
CONTEXTS: dict[str, str] = {
    "beach": "on the beach",
    "snow": "in the snow",
    "jungle": "in the jungle",
    "night": "at night",
    "city": "in the city",
    "wood": "on a wooden floor",
    "fabric": "on pink fabric",
    "rug": "on a blue rug",
    "desert": "in the desert",
    "water": "under water",
}
SYNONYMS: dict[str, tuple[str, ...]] = {
    "beach": ("at the beach", "on a sandy beach"),
    "snow": ("on the snow", "in winter"),
    "jungle": ("in a jungle", "in the forest"),
    "night": ("under the night sky", "in the moonlight"),
    "city": ("with a city in the background", "on the street"),
    "wood": ("on top of a wooden floor", "on the floor"),
    "fabric": ("on top of pink fabric", "on a pink cloth"),
    "rug": ("on top of a blue rug", "on a blue carpet"),
    "desert": ("in a desert", "on a sand dune"),
    "water": ("under the sea", "in the water"),
}
OPENINGS = (
    "a photo of a ",
    "a photo of a ",
    "a photo of a ",
    "a ",
    "a ",
    "a picture of a ",
    "a drawing of a ",
)
RARE_WORDS = ("sks", "zwx", "ohwx", "qxj", "vlk", "bmr", "tfy", "wug")
PATTERNS = ("plain", "stripes", "bars", "dots")
EMBLEMS = ("none", "star", "heart", "bolt", "ring")
HATS = ("none", "top", "cone", "bow", "leaf")

_RARE_SHARE = 0.06


def draw_instance(seed: int | str, class_noun: str | None = None, fancy: bool = False) -> Instance:
    """The instance of this seed; a fancy one has a pattern, emblem, hat and second colour."""
    if class_noun is not None and class_noun not in CLASSES:
        raise ValueError(
            f"no class noun {class_noun!r} in the pocket world; choose one of {', '.join(CLASSES)}"
        )
    rng = random.Random(f"instance:{seed}")
    chosen = rng.choice(CLASSES)
    a = rng.choice(list(COLORS))
    b = rng.choice([name for name in COLORS if name != a])
    if rng.random() < 0.2 and not fancy:
        b = a
    others = [name for name in COLORS if name not in (a, b)]
    first = 1 if fancy else 0
    return Instance(
        class_noun=class_noun or chosen,
        a=a,
        b=b,
        e=rng.choice(others),
        h=rng.choice(others),
        pattern=_pick(rng, PATTERNS, 0.52)[first],
        emblem=_pick(rng, EMBLEMS, 0.4)[first],
        hat=_pick(rng, HATS, 0.48)[first],
        girth=round(rng.random(), 2),
        stature=round(rng.random(), 2),
    )


def render(instance: Instance, context: str, seed: int | str) -> Image.Image:
    """The 64x64 RGB picture of an instance in a context; the seed moves it a little."""
    if context not in CONTEXTS:
        raise ValueError(
            f"no context {context!r} in the pocket world; choose one of {', '.join(CONTEXTS)}"
        )
    rng = random.Random(f"render:{seed}")
    canvas = Image.new("RGB", (CANVAS, CANVAS))
    SCENES[context](Scene(canvas, rng))
    scale = rng.uniform(88, 98)
    x, y = 128 + rng.uniform(-9, 9), 134 + rng.uniform(-5, 5)
    afloat = context == "water" or instance.class_noun == "fish"
    if not afloat:
        shade = Image.new("L", canvas.size, 0)
        ImageDraw.Draw(shade).ellipse(
            (x - scale, y + 0.8 * scale, x + scale, y + 1.1 * scale), fill=84
        )
        canvas.paste((10, 10, 20), (0, 0), shade)
    tint, amount = {"night": ((24, 28, 90), 0.12), "water": ((30, 130, 170), 0.08)}.get(
        context, (INK, 0.0)
    )
    paint = {key: mix(COLORS[getattr(instance, key)], tint, amount) for key in "abeh"}
    pen = Pen(canvas, x, y, scale, math.radians(rng.uniform(-4, 4)), instance, paint)
    FIGURES[instance.class_noun](pen)
    return canvas.reduce(CANVAS // SIZE)


def caption(instance: Instance, context: str, seed: int | str) -> str:
    """What a person might write under the picture; 6 % carry a rare word that means nothing."""
    rng = random.Random(f"caption:{seed}")
    rare = rng.choice(RARE_WORDS) + " " if rng.random() < _RARE_SHARE else ""
    opening = rng.choice(OPENINGS)
    place = rng.choice(SYNONYMS[context]) if rng.random() < 0.25 else CONTEXTS[context]
    noun = instance.class_noun
    kind = rng.random()
    if kind < 0.52:
        return f"{opening}{rare}{instance.a} {noun} {place}"
    if kind < 0.74:
        return f"{opening}{rare}{noun} {place}"
    if kind < 0.87:
        return f"{opening}{rare}{instance.a} {noun}"
    if kind < 0.97:
        return f"{opening}{rare}{noun}"
    return place


def example(seed: int | str) -> tuple[Image.Image, str, Instance, str]:
    """One captioned picture of the world: (image, caption, instance, context)."""
    instance = draw_instance(seed)
    context = random.Random(f"context:{seed}").choice(list(CONTEXTS))
    return render(instance, context, seed), caption(instance, context, seed), instance, context


def subject_photos(instance: Instance, n: int, seed: int | str) -> list[Image.Image]:
    """n photos of one subject, each in another context and pose, as long as contexts last."""
    contexts = list(CONTEXTS)
    random.Random(f"photos:{seed}").shuffle(contexts)
    return [render(instance, contexts[i % len(contexts)], f"{seed}/{i}") for i in range(n)]


def clutter(seed: int | str) -> Image.Image:
    """A 64x64 picture of random shapes: teaches an autoencoder what the world does not show."""
    rng = random.Random(f"clutter:{seed}")
    canvas = Image.new("RGB", (CANVAS, CANVAS), _any_color(rng))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(12, 60)):
        x, y, r = (
            rng.uniform(0, CANVAS),
            rng.uniform(0, CANVAS),
            min(110.0, 8 / (rng.random() ** 0.7 + 0.04)),
        )
        kind, color = rng.random(), _any_color(rng)
        if kind < 0.45:
            draw.ellipse((x - r, y - r * rng.uniform(0.4, 1), x + r, y + r), fill=color)
        elif kind < 0.75:
            turn = rng.random() * 6
            draw.polygon(
                [
                    (x + r * math.cos(turn + k), y + r * math.sin(turn + k))
                    for k in (0, 1.3, 3.1, 4.4)
                ],
                color,
            )
        else:
            draw.line(
                (x, y, x + r * rng.uniform(-2, 2), y + r * rng.uniform(-2, 2)),
                color,
                rng.randint(3, 16),
            )
    return canvas.reduce(CANVAS // SIZE)


def vocabulary() -> list[str]:
    """Every word that a caption of this world can hold, sorted, each once."""
    phrases = [
        *OPENINGS,
        *CONTEXTS.values(),
        *(phrase for group in SYNONYMS.values() for phrase in group),
    ]
    return sorted(
        {word for text in (*phrases, *COLORS, *CLASSES, *RARE_WORDS) for word in text.split()}
    )


def picture(rgb: bytes, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """The picture whose raw RGB bytes (row by row) these are."""
    return Image.frombytes("RGB", size, rgb)


def sheet(pictures: Sequence[Image.Image], columns: int, zoom: int = 2) -> Image.Image:
    """A contact sheet: the pictures row by row, enlarged without smoothing, on white."""
    cell = SIZE * zoom + 2
    rows = -(-len(pictures) // columns)
    out = Image.new("RGB", (columns * cell, rows * cell), (255, 255, 255))
    for i, one in enumerate(pictures):
        large = one.resize((SIZE * zoom, SIZE * zoom), Image.Resampling.NEAREST)
        out.paste(large, ((i % columns) * cell, (i // columns) * cell))
    return out


def _pick(rng: random.Random, names: Sequence[str], plain_share: float) -> tuple[str, str]:
    """(one name with the first at plain_share, one name that is never the first)."""
    other = rng.choice(names[1:])
    return (names[0] if rng.random() < plain_share else other), other


def _any_color(rng: random.Random) -> Color:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)
