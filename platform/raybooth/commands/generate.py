"""`raybooth generate`: pictures of a subject, or of a base, sampled here without a server."""

from __future__ import annotations

import argparse
import math
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from raybooth.config import SamplingDefaults
from raybooth.config.adapter import countable
from raybooth.errors import InputError, NotPublishedError, RequestError, StoreError
from raybooth.home import store_folder
from raybooth.store import AdapterRecord, FullRecord, Record, Store

if TYPE_CHECKING:
    from PIL.Image import Image

    from raybooth.model.sampler import SampleRequest

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_SEED = 2**63 - 1
MAX_IMAGES = 256


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "generate",
        help="sample pictures of a subject, without a server",
        description="Sample pictures of a published subject, or of a plain base by its name. "
        "Image i of n has seed + i; more than one go into one grid.",
    )
    defaults = SamplingDefaults()
    parser.add_argument("reference", metavar="SUBJECT[@VERSION]", help="or the base's name")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--seed", type=int, help="drawn and printed if not given")
    parser.add_argument("--steps", type=int, default=defaults.num_inference_steps, metavar="N")
    parser.add_argument("--guidance", type=float, default=defaults.guidance_scale, metavar="G")
    parser.add_argument("--solver", choices=("ddim", "euler", "dpmpp2m"), default=defaults.solver)
    parser.add_argument("-n", type=int, default=1, metavar="N", help="images (default 1)")
    parser.add_argument("-o", "--output", type=Path, default=Path("out.png"), metavar="FILE")
    parser.add_argument("--negative-prompt", default="", metavar="PROMPT")
    parser.add_argument("--adapter-scale", type=float, default=1.0, metavar="S")
    parser.add_argument(
        "--with",
        dest="others",
        type=_other,
        action="append",
        default=[],
        metavar="SUBJECT[:SCALE]",
        help="another subject in the same pictures (may be given more than once)",
    )
    parser.add_argument("--size", metavar="WxH", help="pixels (default: the base's own)")
    parser.add_argument("--base", help="load the base from here, not from where it was trained")
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    _check(arguments)
    width, height = _size(arguments.size)
    record = _record(arguments.reference, arguments.base)
    if isinstance(record, FullRecord) and arguments.adapter_scale != 1.0:
        found = f"{record.reference} is a full fine-tune"
        raise RequestError("--adapter-scale has no adapter to scale", found, "leave it out")
    parts = _parts(record, arguments)

    import torch

    from raybooth.model.base import cut_tokens, load_base
    from raybooth.model.published import take_on, take_on_several, text_of
    from raybooth.model.sampler import SampleRequest, generate

    if record is None:
        source, revision = arguments.base or arguments.reference, None
    else:
        source, revision = arguments.base or record.base.name, record.base.revision
    revision = None if arguments.base else revision
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(source, revision=revision, device=device)
    text, bank, scale = None, None, arguments.adapter_scale
    folder = Store(store_folder()).folder
    if len(parts) > 1:
        whole = [(each, folder(each.reference), scale) for each, scale in parts]
        (bank, text), scale = take_on_several(base, whole), 1.0
    elif record is not None:
        text = text_of(base, record, folder(record.reference))
        bank = take_on(base, record, folder(record.reference))
    for prompt in (arguments.prompt, arguments.negative_prompt):
        for each, _ in parts:
            prompt = countable(prompt, each.identifier, each.identifier_tokens)
        if cut := cut_tokens(base, prompt):
            found = f"these tokens would be cut: {' '.join(cut[:20])}"
            raise RequestError("a prompt is too long for this base", found, "shorten it")
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    requests = [
        SampleRequest(
            prompt=arguments.prompt,
            negative_prompt=arguments.negative_prompt,
            seed=seed + index,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            solver=arguments.solver,
            height=height,
            width=width,
            slot=0 if bank is None else 1,
            adapter_scale=scale,
            zero_terminal_snr=record is not None and record.zero_terminal_snr,
            text=text,
        )
        for index in range(arguments.n)
    ]
    images = generate(base, bank, requests)
    _save(_grid(images), arguments.output)
    print(_line(arguments.output, requests, _columns(len(images))))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Everything that can be known before the base is loaded."""
    if not 1 <= arguments.n <= MAX_IMAGES:
        raise RequestError("-n is out of range", str(arguments.n), f"use 1 to {MAX_IMAGES}")
    last = (arguments.seed or 0) + arguments.n - 1
    if (arguments.seed or 0) < 0 or last > MAX_SEED:
        raise RequestError("--seed is out of range", str(arguments.seed), f"use 0 to {MAX_SEED}")
    for name, least in (("guidance", 0.0), ("adapter_scale", -math.inf)):
        value = getattr(arguments, name)
        if not (math.isfinite(value) and value >= least):
            raise RequestError(f"--{name.replace('_', '-')} is out of range", str(value))
    output: Path = arguments.output
    if output.suffix.lower() not in SUFFIXES:
        do = f"end it in {', '.join(SUFFIXES)}"
        raise InputError("-o names no picture format", str(output), do)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InputError("-o cannot be written", str(output), "give a file in a folder that exists")


def _other(text: str) -> tuple[str, float]:
    """SUBJECT[:SCALE] as (reference, scale)."""
    reference, colon, scale = text.partition(":")
    try:
        value = float(scale) if colon else 1.0
    except ValueError:
        value = math.nan
    if not (reference and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not SUBJECT or SUBJECT:SCALE")
    return reference, value


def _parts(
    record: Record | None, arguments: argparse.Namespace
) -> list[tuple[AdapterRecord, float]]:
    """The adapters of every picture with their scales; none for a base or a full fine-tune."""
    parts = [(record, float(arguments.adapter_scale))]
    parts += [(_record(reference, arguments.base), scale) for reference, scale in arguments.others]
    adapters = [(each, scale) for each, scale in parts if isinstance(each, AdapterRecord)]
    if arguments.others and len(adapters) < len(parts):
        do = "name subjects that are adapters, or leave --with out"
        raise RequestError("--with puts adapters together, and adapters alone", "", do)
    return adapters


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
    if match is None:
        raise RequestError("--size is not understood", repr(size), "use WIDTHxHEIGHT, as 64x64")
    return int(match[1]), int(match[2])


def _record(reference: str, base: str | None) -> Record | None:
    """The published model, checked, or None where `reference` names the base itself."""
    if reference in ("pocket", base) or (base and reference == Path(base).name):
        return None
    store = Store(store_folder())
    try:
        record = store.fetch(reference)
    except NotPublishedError:
        if "/" in reference and Path(reference).expanduser().is_dir():
            return None
        raise
    if wrong := store.verify(record.reference):
        do = "delete it and train the subject again"
        raise StoreError(f"{record.reference} is damaged", "; ".join(wrong), do)
    return record


def _columns(count: int) -> int:
    return math.ceil(math.sqrt(count))


def _grid(images: Sequence[Image]) -> Image:
    """The images row by row; one image is itself."""
    from PIL import Image

    columns = _columns(len(images))
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * width, place // columns * height))
    return sheet


def _save(image: Image, output: Path) -> None:
    """Written beside, then renamed: whole or not at all."""
    staging = output.with_name(f".{uuid4().hex}{output.suffix}")
    try:
        image.save(staging)
        os.replace(staging, output)
    except OSError as error:
        found = error.strerror or str(error)
        raise InputError(f"{output} cannot be written", found, "choose another -o") from error
    finally:
        staging.unlink(missing_ok=True)


def _line(output: Path, requests: Sequence[SampleRequest], columns: int) -> str:
    first, last = requests[0].seed, requests[-1].seed
    if len(requests) == 1:
        return f"{output}: seed {first}"
    rows = -(-len(requests) // columns)
    return f"{output}: {len(requests)} images, {columns} by {rows}, seeds {first} to {last}"
