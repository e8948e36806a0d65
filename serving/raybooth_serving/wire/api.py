"""Wire schemas of `/v1/images/generations` and `/v1/models`, as the `openai` clients speak them.

Unknown keys are refused. Keys of OpenAI's that have no effect here are accepted at their default
value only; our own (guidance_scale, solver, ...) travel in the client's `extra_body`.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from raybooth.config import LimitsConfig, Solver
from raybooth.errors import RequestError
from raybooth_serving.pictures.receipt import Receipt

MAX_SEED = 2**63 - 1

NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "quality": ("auto", "standard"),
    "style": ("vivid",),
    "background": ("auto", "opaque"),
    "moderation": ("auto",),
}
"""OpenAI's keys that change nothing here, and the values that ask for nothing."""


_SIZE = "([1-9][0-9]{0,4})x([1-9][0-9]{0,4})"


def _only(name: str) -> dict[str, Any]:
    return {"enum": [*NO_EFFECT[name], None]}


class AdapterChoice(BaseModel):
    """One subject among several in one image."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    subject: str = Field(min_length=1, max_length=256)
    """`subject`, `subject@version` or `subject@alias`."""

    scale: float = Field(1.0, ge=-10, le=10, allow_inf_nan=False)


class ImagesRequest(BaseModel):
    """The body of `POST /v1/images/generations`; a key that is null counts as not given."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = Field(min_length=1, max_length=256)
    """`subject`, `subject@version`, `subject@alias`, or the base's own name."""

    adapters: list[AdapterChoice] = Field([], max_length=16)
    """Several subjects in each image; `model` is then the base's name or the first of them."""

    prompt: str = Field(min_length=1)
    n: int = Field(1, ge=1)
    size: str = Field("auto", json_schema_extra={"pattern": f"^(auto|{_SIZE})$"})
    """`WIDTHxHEIGHT` in pixels, or `auto` for the base's native size."""

    response_format: Literal["b64_json", "url"] = "b64_json"
    """`url` answers data URLs."""

    user: str | None = None
    safety_identifier: str | None = None
    """Both accepted and not used."""

    quality: str | None = Field(None, json_schema_extra=_only("quality"))
    style: str | None = Field(None, json_schema_extra=_only("style"))
    background: str | None = Field(None, json_schema_extra=_only("background"))
    moderation: str | None = Field(None, json_schema_extra=_only("moderation"))

    output_format: Literal["png", "webp", "jpeg"] = "png"
    output_compression: int = Field(100, ge=0, le=100)
    """Quality of WebP and JPEG."""

    stream: bool = False
    """Server-sent events: previews, then each image as it is done."""

    partial_images: int = Field(0, ge=0, le=3)
    """Previews of each image in a stream."""

    negative_prompt: str = ""
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    """Of the first image; image i has seed + i. None draws one, which the answer tells."""

    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, allow_inf_nan=False)
    solver: Solver | None = None
    adapter_scale: float = Field(1.0, ge=-10, le=10, allow_inf_nan=False)
    deterministic: bool = False
    """Every denoise step in the smallest bucket that holds the image alone: the same request is the
    same bytes on the same hardware and versions, whatever else the endpoint does."""

    @field_validator("guidance_scale", "adapter_scale")
    @classmethod
    def _no_negative_zero(cls, value: float | None) -> float | None:
        return None if value is None else value + 0.0

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if value is not None}
        return values


class InputTokens(BaseModel):
    """Of a request's tokens, which are what; images are never given."""

    image_tokens: int = 0
    text_tokens: int


class Usage(BaseModel):
    """What one image was made from and of, as OpenAI counts it."""

    input_tokens: int
    """Of both prompts."""

    output_tokens: int
    """Latent positions of the image: one for each 8x8 pixels of Stable Diffusion."""

    total_tokens: int
    input_tokens_details: InputTokens


class ImageData(BaseModel):
    """One image of an answer; `seed` reproduces it with n = 1."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    flagged: Literal[True] | None = None
    """The safety checker took the image for unfit, so it is black; else left out."""

    receipt: Receipt


class ImagesResponse(BaseModel):
    """The answer of `POST /v1/images/generations`."""

    created: int
    data: list[ImageData]
    size: str
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "webp", "jpeg"]
    usage: Usage
    model: str
    """`subject@version` as served (of several, joined with `+`), or the base's name."""


class _PictureEvent(BaseModel):
    b64_json: str
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "webp", "jpeg"]
    image_index: int
    """Which of the n images."""


class PartialImageEvent(_PictureEvent):
    """The event of a preview in a streamed answer."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int


class CompletedEvent(_PictureEvent):
    """The event of a finished image in a streamed answer."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: Usage
    seed: int
    flagged: Literal[True] | None = None
    receipt: Receipt


class Note(BaseModel):
    """A comment in a streamed answer."""

    text: str


class ModelCard(BaseModel):
    """One line of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer that is not 2xx."""

    error: ErrorDetail


class ParameterError(RequestError):
    """One parameter of a request cannot be used; `param` is its name."""

    def __init__(self, param: str, what: str, found: str = "", do: str = "") -> None:
        Exception.__init__(self, param, what, found, do)
        self.param, self.what, self.found, self.do = param, what, found, do


_WITHOUT = {
    "output_compression": "output_format png",
    "partial_images": "no stream",
    "adapter_scale": "adapters, each of which has a scale",
}


def check_limits(request: ImagesRequest, limits: LimitsConfig) -> None:
    """Raises ParameterError for the first value that this endpoint does not take."""
    for name, accepted in NO_EFFECT.items():
        value = getattr(request, name)
        if value is not None and value not in accepted:
            do = f"leave it out, or send {' or '.join(map(repr, accepted))}"
            raise ParameterError(name, f"{name} has no effect here", repr(value), do)
    for name, has_effect in (
        ("output_compression", request.output_format != "png" or request.output_compression == 100),
        ("partial_images", request.stream or not request.partial_images),
        ("adapter_scale", not request.adapters or request.adapter_scale == 1.0),
    ):
        if not has_effect:
            found = f"{getattr(request, name)} with {_WITHOUT[name]}"
            raise ParameterError(name, f"{name} has no effect here", found, "leave it out")
    _at_most("n", request.n, limits.max_images)
    _at_most("num_inference_steps", request.num_inference_steps, limits.max_inference_steps)
    _at_most("guidance_scale", request.guidance_scale, limits.max_guidance_scale)
    for name in ("prompt", "negative_prompt"):
        text: str = getattr(request, name)
        if len(text) > limits.max_prompt_characters:
            do = f"use at most {limits.max_prompt_characters} characters"
            raise ParameterError(name, f"{name} is too long", f"{len(text)} characters", do)
        control = next((each for each in text if _is_control(each)), None)
        if control is not None:
            raise ParameterError(name, f"{name} holds a {_named(control)}", "", "remove it")
    if request.seed is not None and request.seed + request.n - 1 > MAX_SEED:
        do = f"seed + n - 1 may be at most {MAX_SEED}"
        raise ParameterError("seed", "seed is too large for n images", str(request.seed), do)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\t\n\r"


def _named(character: str) -> str:
    return "NUL character" if character == "\x00" else f"control character {ord(character):#04x}"


def parse_size(size: str, native: int) -> tuple[int, int]:
    """(width, height) of `WIDTHxHEIGHT` or `auto`; raises ParameterError."""
    if size == "auto":
        return native, native
    match = re.fullmatch(_SIZE, size)
    if match is None:
        do = f"use WIDTHxHEIGHT such as {native}x{native}, or auto"
        raise ParameterError("size", "size is not understood", repr(size[:40]), do)
    return int(match[1]), int(match[2])


def _at_most(name: str, value: float | None, most: float) -> None:
    if value is not None and value > most:
        raise ParameterError(name, f"{name} is too large", str(value), f"use at most {most:g}")
