"""Captions that cannot be used are refused by the file's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from raybooth.errors import SubjectError
from raybooth.sidecar import caption_file, is_mask, mask_file, read_caption


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return tmp_path / "rex.1.png"


def test_names(photo: Path) -> None:
    assert caption_file(photo).name == "rex.1.txt"
    assert mask_file(photo).name == "rex.1.mask.png"
    assert is_mask(mask_file(photo))
    assert not is_mask(photo)


def test_a_caption_is_one_line_of_template(photo: Path) -> None:
    assert read_caption(photo) is None
    text = "\ufeffa photo of {identifier}\r\n  {class_noun} auf der Wiese, größer\n"
    caption_file(photo).write_bytes(text.encode())
    assert read_caption(photo) == "a photo of {identifier} {class_noun} auf der Wiese, größer"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("größer".encode("latin-1"), "rex.1.txt is not UTF-8"),
        (b"\xff\xfea\x00", "is not UTF-8"),
        (b" \n", "rex.1.txt is empty"),
        (b"a" * 5000, "rex.1.txt is too long"),
        (b"a {colour} dog", "rex.1.txt has unknown braces"),
        (b"a {identifier", "has unknown braces"),
        (b"a {} dog", "has unknown braces"),
    ],
)
def test_each_unusable_caption_is_named(photo: Path, data: bytes, expected: str) -> None:
    caption_file(photo).write_bytes(data)
    with pytest.raises(SubjectError, match=expected):
        read_caption(photo)


def test_a_folder_in_the_captions_place_is_refused(photo: Path) -> None:
    caption_file(photo).mkdir()
    with pytest.raises(SubjectError, match="cannot be read"):
        read_caption(photo)
