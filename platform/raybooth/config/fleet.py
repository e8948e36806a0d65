"""Who is trained on what: fleet files, and bases by a short name."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from raybooth.config.tracking import TrackingConfig
from raybooth.config.words import SubjectId
from raybooth.reading import Strict


class PromptsConfig(Strict):
    """Words of one subject that differ from the train config's."""

    instance: str | None = None
    prior: str | None = None
    samples: tuple[str, ...] | None = None


class SubjectDefaults(Strict):
    """Values of every subject of a fleet that does not say otherwise."""

    class_noun: str | None = None
    identifier: str = "sks"
    prompts: PromptsConfig = PromptsConfig()
    seed: int | None = Field(None, ge=0, lt=2**63)
    overrides: dict[str, Any] = Field(default_factory=dict)


class SubjectConfig(Strict):
    """One subject of a fleet file."""

    id: SubjectId
    """A DNS label: lower-case letters, digits and inner hyphens, at most 63."""

    class_noun: str | None = Field(None, min_length=1)
    images: str | tuple[str, ...]
    """A folder, or a list of files; relative to the fleet file."""

    identifier: str | None = Field(None, min_length=1)
    prompts: PromptsConfig = PromptsConfig()
    seed: int | None = Field(None, ge=0, lt=2**63)
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Train config values of this subject alone, nested as in configs/train."""


class FleetConfig(Strict):
    """A fleet file: one base, one way of training, many subjects."""

    base: str = "pocket"
    """`pocket`, a name of configs/base, a folder in diffusers' layout, or a Hub id."""

    revision: str | None = None
    """Commit of a Hub id; required for one."""

    train: str | dict[str, Any] = "pocket-lora"
    """A file of configs/train (its name or path), or its contents inline."""

    defaults: SubjectDefaults = SubjectDefaults()
    tracking: TrackingConfig = TrackingConfig()
    subjects: tuple[SubjectConfig, ...] = Field(min_length=1)


class BaseConfig(Strict):
    """A base by a short name; the files of configs/base. `base: sd15` means configs/base/sd15."""

    base: str
    """`pocket`, a name of configs/base, a folder in diffusers' layout, or a Hub id."""

    revision: str | None = None
    """Commit of a Hub id; required for one."""
