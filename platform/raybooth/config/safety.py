"""Who may call the endpoint, and what it will not make."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from raybooth.reading import Strict

_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class AuthConfig(Strict):
    """When callers must show an API key (`raybooth keys create`)."""

    required: Literal["auto", "always", "never"] = "auto"
    """auto: everywhere but at a loopback host; never: refused anywhere but at a loopback host."""

    max_requests_per_key: int = Field(64, ge=1)
    """Requests in progress of one key at one gateway; more are refused (429)."""


class SafetyConfig(Strict):
    """What is looked at before a prompt is queued and before a picture is sent."""

    policy: str | None = None
    """`package.module:callable`, asked of each prompt (raybooth_serving.access.policy)."""

    checker: str | None = None
    """diffusers' StableDiffusionSafetyChecker: a folder, or a Hub id as org/name@commit."""

    on_flag: Literal["refuse", "blank"] = "refuse"
    """A flagged image: the request is refused, or the image is black and says `flagged`."""

    @field_validator("policy")
    @classmethod
    def _is_import_path(cls, policy: str | None) -> str | None:
        if policy is not None and not _IMPORT_PATH.fullmatch(policy):
            raise ValueError("write it as package.module:callable")
        return policy

    @model_validator(mode="after")
    def _no_effect_is_refused(self) -> Self:
        if self.checker is None and self.on_flag != "refuse":
            raise ValueError("on_flag has no effect without a checker; remove it")
        return self
