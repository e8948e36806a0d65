"""Picture files: their levels, what they tell of their making, and what they keep to themselves."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raybooth.errors import InputError, RequestError
from raybooth_serving.pictures.files import (
    MAX_JPEG_XMP_BYTES,
    SOURCE_TYPE,
    Format,
    encode,
    open_picture,
    read_receipt,
)
from tests.raybooth_serving.receipts import a_receipt

FORMATS: tuple[Format, ...] = ("png", "webp", "jpeg")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    levels = np.add.outer(np.arange(24) * 5, np.arange(32) * 4)
    return Image.fromarray(np.stack([levels, levels[::-1], levels[:, ::-1]], -1).astype(np.uint8))


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_says_that_a_model_made_it(
    image: Image.Image, form: Format, tmp_path: Path
) -> None:
    receipt = a_receipt()
    content = encode(image, form, 90, receipt)
    assert SOURCE_TYPE.encode() in content
    assert b"RayBooth" in content
    assert b"dog-a@1" in content
    (tmp_path / "picture").write_bytes(content)
    assert read_receipt(tmp_path / "picture") == receipt
    assert encode(image, form, 90, receipt) == content


@pytest.mark.parametrize("form", FORMATS)
def test_no_prompt_is_kept_where_none_shall_be(image: Image.Image, form: Format) -> None:
    content = encode(image, form, 90, a_receipt().without_prompts())
    assert b"photo" not in content


def test_png_keeps_every_level_and_the_others_compress(image: Image.Image) -> None:
    assert open_picture(encode(image, "png", 100, a_receipt())).tobytes() == image.tobytes()
    for form in ("webp", "jpeg"):
        best, worst = (encode(image, form, quality, None) for quality in (100, 5))
        assert len(worst) < len(best)
        error = np.asarray(open_picture(best), int) - np.asarray(image, int)
        assert np.abs(error).max() <= 12
        assert Image.open(io.BytesIO(best)).format == form.upper()


@pytest.mark.parametrize("form", FORMATS)
def test_a_preview_says_that_a_model_made_it_and_no_more(
    image: Image.Image, form: Format, tmp_path: Path
) -> None:
    content = encode(image, form, 100, None)
    assert SOURCE_TYPE.encode() in content
    (tmp_path / "preview.png").write_bytes(content)
    with pytest.raises(InputError, match=r"preview.png carries no receipt"):
        read_receipt(tmp_path / "preview.png")


def test_a_receipt_too_long_for_a_jpeg_is_refused(image: Image.Image) -> None:
    receipt = a_receipt(prompt="x" * MAX_JPEG_XMP_BYTES)
    with pytest.raises(RequestError, match=r"does not fit a JPEG.*use output_format png"):
        encode(image, "jpeg", 90, receipt)
    assert encode(image, "png", 100, receipt)
    assert encode(image, "webp", 90, receipt)


def test_receipts_are_read_from_answers(tmp_path: Path) -> None:
    receipt, path = a_receipt(), tmp_path / "answer.json"
    one = json.loads(receipt.json_text())
    for value in (one, {"seed": 1, "receipt": one}, {"created": 1, "data": [{"receipt": one}]}):
        path.write_text(json.dumps(value))
        assert read_receipt(path) == receipt


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "neither a picture nor a receipt"),
        (b"\x89PNG\r\n\x1a\n", "neither a picture nor a receipt"),
        (b"{", "is not JSON"),
        (b'{"data": ' + b"[" * 100_000, "is not JSON"),
        (b'{"data": [1, 2]}', "is not of one image.*2 images"),
        (b'{"data": 3}', "no list of images"),
        (b'{"version": 9}', "no receipt that this version knows"),
    ],
)
def test_what_is_no_receipt(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError, match=told):
        read_receipt(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_receipt(tmp_path / "nothing.png")
