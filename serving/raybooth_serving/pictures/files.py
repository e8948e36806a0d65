"""Picture files: PNG, WebP or JPEG, each saying that a model made it, and how.

In every format XMP names the software, IPTC's digital source type (trainedAlgorithmicMedia: a
trained model made it) and holds the receipt; PNG has it as the text `raybooth:receipt` too. Nothing
of the caller is in it, and no time: the same image is the same bytes.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from pydantic import ValidationError

from raybooth import __version__
from raybooth.errors import InputError, RequestError
from raybooth_serving.pictures.receipt import Receipt

Format = Literal["png", "webp", "jpeg"]

SOFTWARE = f"RayBooth {__version__}"
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
RECEIPT = "raybooth:receipt"
NAMESPACE = "urn:raybooth:receipt:1"
MAX_JPEG_XMP_BYTES = 65502


def encode(image: Image.Image, form: Format, compression: int, receipt: Receipt | None) -> bytes:
    """The file of `image`; `compression` is the quality of WebP and JPEG, 0 to 100.

    A receipt is left out of previews only. Raises RequestError when it does not fit a JPEG.
    """
    file = io.BytesIO()
    xmp = xmp_packet(receipt)
    if form == "png":
        text = PngInfo()
        text.add_text("Software", SOFTWARE)
        if receipt is not None:
            text.add_text(RECEIPT, receipt.json_text())
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        image.save(file, "PNG", pnginfo=text)
    elif form == "webp":
        image.save(file, "WEBP", quality=compression, xmp=xmp)
    else:
        if len(xmp) > MAX_JPEG_XMP_BYTES:
            do = "use output_format png, or a shorter prompt"
            raise RequestError("the receipt does not fit a JPEG", f"{len(xmp)} bytes", do)
        image.save(file, "JPEG", quality=compression, subsampling=0, xmp=xmp)
    return file.getvalue()


def xmp_packet(receipt: Receipt | None) -> bytes:
    """XMP (ISO 16684-1) of a picture that a model made, and by a receipt which and how."""
    models = making = ""
    if receipt is not None:
        names = [*(adapter.reference for adapter in receipt.adapters), receipt.base.name]
        models = f" Iptc4xmpExt:AISystemUsed={quoteattr(', '.join(names))}"
        making = f"<{RECEIPT}>{escape(receipt.json_text())}</{RECEIPT}>"
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about=""'
        ' xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        f" xmlns:raybooth={quoteattr(NAMESPACE)}"
        f" xmp:CreatorTool={quoteattr(SOFTWARE)}"
        f" Iptc4xmpExt:DigitalSourceType={quoteattr(SOURCE_TYPE)}{models}>{making}"
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
        '<?xpacket end="w"?>'
    ).encode()


def read_receipt(path: Path) -> Receipt:
    """The receipt in a picture file or a JSON file.

    A JSON file holds a receipt, an image of an answer, or an answer with one image. Raises
    InputError when there is none, or more than one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read", error.strerror or str(error)) from error
    is_json = content.lstrip()[:1] == b"{"
    text = _text_in_answer(path, content) if is_json else _text_in_picture(path, content)
    try:
        return Receipt.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc'])) or 'the text'}: {first['msg']}"
        raise InputError(f"{path} holds no receipt that this version knows", found) from error


def open_picture(content: bytes) -> Image.Image:
    """The RGB levels of a picture file; raises UnidentifiedImageError for what is none."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def _text_in_answer(path: Path, content: bytes) -> bytes:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON", str(error)) from error
    images = value.get("data", [value])
    if not isinstance(images, list) or len(images) != 1 or not isinstance(images[0], dict):
        found = f"{len(images)} images" if isinstance(images, list) else "no list of images"
        raise InputError(f"{path} is not of one image", found, "save the receipt of one of them")
    return json.dumps(images[0].get("receipt", images[0])).encode()


def _text_in_picture(path: Path, content: bytes) -> bytes:
    do = "give a picture that RayBooth made, or the `receipt` of an answer as JSON"
    try:
        with Image.open(io.BytesIO(content)) as image:
            info = dict(image.info)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        raise InputError(f"{path} is neither a picture nor a receipt", "", do) from error
    if RECEIPT in info:
        return str(info[RECEIPT]).encode()
    xmp = info.get("xmp", b"")
    try:
        text = ElementTree.fromstring(xmp).findtext(f".//{{{NAMESPACE}}}receipt")
    except ElementTree.ParseError:
        text = None
    if text is None:
        raise InputError(f"{path} carries no receipt", "", do)
    return text.encode()
