"""Every photo that cannot be trained on is refused by name; every other keeps its pixels."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raybooth.data.images import check_photos, load_photo, pixel_digest, to_pixels
from raybooth.errors import SubjectError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def picture(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Smooth colours that differ by seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def check(paths: list[Path], resolution: int = 32, min_images: int = 1) -> list[SubjectError]:
    return check_photos(paths, resolution=resolution, min_images=min_images, subject_id="rex")


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG by hand: what Pillow reads but cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [
        chunk(b"IHDR", header),
        *extra,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_good_photos_of_every_format_pass(tmp_path: Path) -> None:
    names = ["a.jpg", "b.png", "c.webp", "d.jpeg"]
    paths = [save(tmp_path / name, picture(i)) for i, name in enumerate(names)]
    assert check(paths, min_images=4) == []


def test_every_problem_is_listed_at_once_with_its_file(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", picture(0, (64, 64)))
    whole = save(tmp_path / "whole.jpg", picture(1, (64, 64)), quality=95).read_bytes()
    files = {
        "cut.jpg": (whole[: len(whole) // 2], "truncated or damaged"),
        "text.jpg": (b"not a picture at all", "not a JPEG, PNG or WebP"),
        "empty.png": (b"", "empty"),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    save(tmp_path / "twin.webp", picture(0, (64, 64)), lossless=True)
    save(tmp_path / "thin.png", picture(2, (400, 64)))
    save(tmp_path / "small.png", picture(3, (64, 31)))
    expected = {name: words for name, (_, words) in files.items()} | {
        "twin.webp": "duplicate",
        "thin.png": "too long and thin",
        "small.png": "too small for resolution 32",
        "gone.png": "does not exist",
    }
    problems = check([good, *(tmp_path / name for name in expected)], min_images=8)
    texts = [str(problem) for problem in problems]
    for name, words in expected.items():
        assert len([t for t in texts if f"/{name} " in t.split(": found")[0] and words in t]) == 1
    assert all(text.startswith("subject 'rex': ") for text in texts)
    assert all(problem.do for problem in problems)
    assert "too few different photos: found 7; give at least 8" in texts[-1]
    assert len(problems) == len(expected) + 1
    assert "the same pixels as" in next(t for t in texts if "twin" in t)


def test_no_photos_and_too_few() -> None:
    (problem,) = check([], min_images=3)
    assert "no photos" in problem.what
    assert problem.do == "give at least 3"


def test_duplicates_do_not_count_as_photos(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.png", picture(0)) for i in range(3)]
    problems = check(paths, min_images=2)
    assert ["duplicate" in p.what for p in problems] == [True, True, False]
    assert problems[-1].found == "1"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_bytes_are_an_error_of_ours_or_a_picture(tmp_path: Path, suffix: str) -> None:
    whole = save(tmp_path / f"whole.{suffix}", picture(1, (64, 64))).read_bytes()
    rng, path = random.Random(0), tmp_path / f"hurt.{suffix}"
    refused = unnamed = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(bytes(data[: rng.randint(1, len(data))]))
        try:
            assert load_photo(path).mode == "RGB"
        except SubjectError as error:
            refused += 1
            unnamed += str(path) not in error.what
    assert refused > 50
    assert unnamed == 0


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(60000, 60000, 8, 2, b"\0" * 1000))
    just = tmp_path / "just.png"
    just.write_bytes(png(9000, 9000, 8, 2, b"\0" * 1000))
    for path in (bomb, just):
        (problem, *_) = check([path])
        assert "more than 80,000,000 pixels" in problem.what
        assert problem.do == "make it smaller"


def test_a_compressed_text_bomb_is_refused(tmp_path: Path) -> None:
    data = b"Comment\0\0" + zlib.compress(b"a" * (80 * 2**20))
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + data))
    path = tmp_path / "text.png"
    path.write_bytes(png(4, 4, 8, 0, b"\0aaaa" * 4, chunk))
    with pytest.raises(SubjectError, match=r"text\.png"):
        load_photo(path)


def test_an_animation_is_refused(tmp_path: Path) -> None:
    frames = [picture(i) for i in range(3)]
    path = save(tmp_path / "moving.webp", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(SubjectError, match="animation: found 3 frames"):
        load_photo(path)


def test_other_formats_are_refused_whatever_their_name(tmp_path: Path) -> None:
    path = save(tmp_path / "photo.jpg", picture(), format="GIF")
    with pytest.raises(SubjectError, match="not a JPEG, PNG or WebP"):
        load_photo(path)


def test_exif_orientation_is_undone(tmp_path: Path) -> None:
    upright = Image.new("RGB", (40, 60), BLUE)
    upright.paste(RED, (0, 0, 40, 30))
    turns = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright if turn is None else upright.transpose(turn)
        path = save(tmp_path / f"{orientation}.png", stored, exif=exif)
        loaded = load_photo(path)
        assert loaded.size == (40, 60)
        assert (loaded.getpixel((20, 5)), loaded.getpixel((20, 55))) == (RED, BLUE)
    assert len({pixel_digest(load_photo(p)) for p in tmp_path.iterdir()}) == 1


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([*RED, *GREEN, *BLUE])
    image.paste(2, (0, 0, 16, 32))
    plain = load_photo(save(tmp_path / "plain.png", image))
    assert (plain.getpixel((0, 0)), plain.getpixel((31, 0))) == (BLUE, GREEN)
    clear = load_photo(save(tmp_path / "clear.png", image, transparency=2))
    assert (clear.getpixel((0, 0)), clear.getpixel((31, 0))) == (WHITE, GREEN)


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (0, 0, 16, 16))
    image.paste((0, 0, 0, 128), (16, 16, 32, 32))
    loaded = load_photo(save(tmp_path / "alpha.png", image))
    assert loaded.getpixel((0, 0)) == WHITE
    assert loaded.getpixel((31, 0)) == RED
    assert loaded.getpixel((31, 31)) == (127, 127, 127)
    grey = Image.new("LA", (32, 32), (0, 0))
    assert load_photo(save(tmp_path / "grey.png", grey)).getpixel((0, 0)) == WHITE


def test_grey_one_bit_and_cmyk(tmp_path: Path) -> None:
    grey = save(tmp_path / "grey.jpg", Image.new("L", (32, 32), 77))
    assert load_photo(grey).getpixel((3, 3)) == (77, 77, 77)
    bit = save(tmp_path / "bit.png", Image.new("1", (32, 32), 1))
    assert load_photo(bit).getpixel((3, 3)) == WHITE
    cmyk = save(tmp_path / "cmyk.jpg", Image.new("CMYK", (32, 32), (0, 255, 255, 0)), quality=100)
    red, green, blue = load_photo(cmyk).getpixel((3, 3))  # type: ignore[misc]
    assert red > 245
    assert max(green, blue) < 10


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 0), (256, 1), (257, 1), (25700, 100), (32896, 128), (65535, 255)]
)
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, value: int, expected: int) -> None:
    array = np.full((32, 32), value, dtype=np.uint16)
    loaded = load_photo(save(tmp_path / "deep.png", Image.fromarray(array)))
    assert loaded.getpixel((5, 5)) == (expected,) * 3


def test_sixteen_bit_colour_and_transparent_grey(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">HHH", 0x8080, 0xFFFF, 0x0000) * 4
    path = tmp_path / "colour.png"
    path.write_bytes(png(4, 4, 16, 2, row * 4))
    assert load_photo(path).getpixel((1, 1)) == (128, 255, 0)
    row = b"\0" + struct.pack(">HH", 1000, 40000) * 2
    trns = struct.pack(">I", 2) + b"tRNS" + struct.pack(">H", 1000)
    trns += struct.pack(">I", zlib.crc32(trns[4:]))
    path.write_bytes(png(4, 4, 16, 0, row * 4, trns))
    assert [load_photo(path).getpixel((x, 0)) for x in (0, 1)] == [WHITE, (156, 156, 156)]


def test_pixels_are_what_the_diffusers_script_makes() -> None:
    """torchvision's Resize(LANCZOS), CenterCrop, ToTensor, Normalize(0.5), by its formulas."""
    for size in ((48, 40), (40, 49), (33, 32), (32, 32), (100, 31 * 2)):
        image, side = picture(4, size), 32
        width, height = size
        scaled = (
            (side, int(side * height / width))
            if width <= height
            else (int(side * width / height), side)
        )
        resized = image if min(size) == side else image.resize(scaled, Image.Resampling.LANCZOS)
        top = round((resized.height - side) / 2.0)
        left = round((resized.width - side) / 2.0)
        array = np.asarray(resized)[top : top + side, left : left + side].astype(np.float32)
        expected = torch.from_numpy(((array / 255) - 0.5) / 0.5).permute(2, 0, 1)
        pixels = to_pixels(image, side, "center")
        assert pixels.shape == (3, side, side)
        assert torch.equal(pixels, expected)


def test_pixels_equal_torchvision_where_it_is_installed() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    lanczos = transforms.InterpolationMode.LANCZOS
    chain = transforms.Compose(
        [
            transforms.Resize(32, interpolation=lanczos),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    for seed, size in enumerate(((48, 40), (40, 49), (33, 32), (65, 131))):
        image = picture(seed, size)
        assert torch.equal(to_pixels(image, 32, "center"), chain(image))


def test_random_crops_are_seeded_and_inside() -> None:
    image = Image.fromarray(np.arange(32 * 90, dtype=np.uint16).astype(np.uint8).reshape(32, 90))
    first = to_pixels(image, 32, "random", seed=1)
    assert torch.equal(first, to_pixels(image, 32, "random", seed=1))
    crops = {to_pixels(image, 32, "random", seed=s).numpy().tobytes() for s in range(40)}
    assert len(crops) > 10
    windows = {
        to_pixels(image.crop((x, 0, x + 32, 32)), 32, "center").numpy().tobytes() for x in range(59)
    }
    assert crops <= windows
    assert {
        to_pixels(picture(0, (32, 32)), 32, "random", seed=s).sum().item() for s in range(5)
    } == {to_pixels(picture(0, (32, 32)), 32, "center").sum().item()}


def test_real_photographs_pass(shared_data: Path) -> None:
    folders = [path for path in (shared_data / "dreambench").iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        paths = sorted(p for p in folder.iterdir() if p.suffix == ".jpg")
        assert check(paths, resolution=512, min_images=3) == []


def test_a_jpeg_and_its_decoded_png_are_duplicates(tmp_path: Path) -> None:
    """Pixels, not bytes, decide."""
    jpeg = save(tmp_path / "a.jpg", picture(5))
    with Image.open(io.BytesIO(jpeg.read_bytes())) as decoded:
        save(tmp_path / "b.png", decoded.convert("RGB"))
    (problem,) = check([jpeg, tmp_path / "b.png"])
    assert "b.png is a duplicate" in problem.what
