"""Words that several configs share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Solver = Literal["ddim", "euler", "dpmpp2m"]
Precision = Literal["fp32", "bf16", "fp16"]
SubjectId = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]


def check_template(name: str, text: str) -> None:
    """ValueError when a prompt's braces hold anything but the two words that a subject fills."""
    try:
        text.format(identifier="sks", class_noun="dog")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{name} is {text!r}; it may hold {{identifier}} and {{class_noun}} only"
        ) from error
