"""Reads what a person wrote: YAML 1.2 in, frozen models out, every mistake listed at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from raybooth.errors import ConfigError, InputError, InputProblems


class Strict(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


Model = TypeVar("Model", bound=Strict)


def load_yaml(path: Path) -> Any:
    """The contents of a YAML 1.2 file (`1e-4` is a number, `no` is a word, keys are unique).

    Raises ConfigError when the file is missing, not UTF-8 or not YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", str(error), "save it as UTF-8") from error
    except OSError as error:
        found = error.strerror or str(error)
        raise ConfigError(f"{path} cannot be read", found, "check the path") from error
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:
        found = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML 1.2", found, "mend the file") from error


def load_config(kind: type[Model], path: Path, overrides: Mapping[str, Any] | None = None) -> Model:
    """The file at `path` as a `kind`, `overrides` merged in key by key.

    Raises InputProblems that lists every wrong key of the file at once.
    """
    return parse_config(kind, merge(load_yaml(path) or {}, overrides or {}), str(path))


def parse_config(kind: type[Model], values: Any, source: str) -> Model:
    """`values` as a `kind`; raises InputProblems that names each wrong key of `source`."""
    if not isinstance(values, Mapping):
        found = type(values).__name__
        raise InputProblems(source, [ConfigError("the top level must be a mapping", found)])
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputProblems(source, problems_of(error)) from error


def problems_of(error: ValidationError, prefix: str = "") -> list[InputError]:
    """Each mistake of a pydantic error as what, found and do."""
    problems: list[InputError] = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "extra_forbidden":
            what, do = f"{prefix}{where} is not a known key", "remove it or check its spelling"
        elif item["type"] == "missing":
            what, do = f"{prefix}{where} is missing", "add it"
        else:
            what, do = f"{prefix}{where}", item["msg"].removeprefix("Value error, ")
        found = "" if item["type"] == "missing" else _short(item["input"])
        problems.append(ConfigError(what, found, do))
    return problems


def merge(below: Any, above: Any) -> Any:
    """`above` laid over `below`, mapping by mapping; anything else is replaced whole."""
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    merged = dict(below)
    for key, value in above.items():
        merged[key] = merge(below[key], value) if key in below else value
    return merged


def find_config(kind: str, name: str, beside: Path | None = None) -> Path:
    """The file that `name` means: a path, or a file of configs/<kind>, with or without .yaml.

    Raises ConfigError listing what there is.
    """
    folders = [configs_folder() / kind]
    here = beside or Path.cwd()
    for candidate in (here / name, *(f / n for f in folders for n in (name, f"{name}.yaml"))):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))
    raise ConfigError(
        f"no {kind} config is called {name!r}", f"{', '.join(known) or 'none'} in configs/{kind}"
    )


def configs_folder() -> Path:
    """The folder of the configs that ship with RayBooth (in a checkout or in a wheel)."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
