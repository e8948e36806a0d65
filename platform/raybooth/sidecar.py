"""What may lie beside a photo: `<photo>.txt`, its caption, and `<photo>.mask.png`, its subject."""

from __future__ import annotations

from pathlib import Path

from raybooth.config.words import check_template
from raybooth.errors import SubjectError

MASK_SUFFIX = ".mask.png"
MAX_CAPTION_BYTES = 4096


def caption_file(photo: Path) -> Path:
    """Where the caption of `photo` lies, if it has one."""
    return photo.with_suffix(".txt")


def mask_file(photo: Path) -> Path:
    """Where the mask of `photo` lies, if it has one."""
    return photo.with_name(photo.stem + MASK_SUFFIX)


def is_mask(file: Path) -> bool:
    """Whether the name is a mask's, so that it is never taken for a photo."""
    return file.name.lower().endswith(MASK_SUFFIX)


def read_caption(photo: Path) -> str | None:
    """The caption's template on one line, None without a file.

    Raises SubjectError, naming the file, when it is not UTF-8, empty, far too long, or holds
    other braces than {identifier} and {class_noun}.
    """
    file = caption_file(photo)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        what = f"the caption {file} cannot be read"
        raise SubjectError(what, error.strerror or str(error), "check the file") from error
    if len(data) > MAX_CAPTION_BYTES:
        what, found = f"the caption {file} is too long", f"{len(data)} bytes"
        raise SubjectError(what, found, f"write at most {MAX_CAPTION_BYTES}")
    try:
        text = " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is 0x{data[error.start]:02x}"
        raise SubjectError(f"the caption {file} is not UTF-8", found, "save it as UTF-8") from error
    if not text:
        do = "write what the photo shows, or remove the file"
        raise SubjectError(f"the caption {file} is empty", "no words", do)
    try:
        check_template("it", text)
    except ValueError as error:
        do = "write {identifier} and {class_noun} only; a brace itself is doubled"
        raise SubjectError(f"the caption {file} has unknown braces", text, do) from error
    return text
