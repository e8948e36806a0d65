"""Every file of configs/ is what its folder's class reads, and says only what that class knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raybooth.config import (
    BaseConfig,
    FleetConfig,
    ServeConfig,
    Strict,
    TrainConfig,
    find_config,
    load_config,
    load_yaml,
    parse_config,
)
from raybooth.errors import ConfigError, InputProblems

CONFIGS = Path(__file__).parents[1] / "configs"
CLASSES: dict[str, type[Strict]] = {
    "base": BaseConfig,
    "train": TrainConfig,
    "fleet": FleetConfig,
    "serve": ServeConfig,
}
FILES = sorted(CONFIGS.glob("*/*.yaml"))


def test_each_folder_has_a_class_and_a_file() -> None:
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    assert folders == set(CLASSES)
    assert {path.parent.name for path in FILES} == folders


def test_configs_hold_yaml_files_and_one_readme() -> None:
    strays = [
        path
        for path in CONFIGS.rglob("*")
        if path.is_file() and path not in FILES and path != CONFIGS / "README.md"
    ]
    assert not strays


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_file_parses_with_the_class_of_its_folder(path: Path) -> None:
    load_config(CLASSES[path.parent.name], path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_unknown_key_is_refused(path: Path, tmp_path: Path) -> None:
    typo = tmp_path / path.name
    typo.write_text(path.read_text() + "\nnum_trian_steps: 1\n")
    with pytest.raises(InputProblems, match="num_trian_steps is not a known key"):
        load_config(CLASSES[path.parent.name], typo)


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_file_is_found_by_its_name(kind: str) -> None:
    for path in FILES:
        if path.parent.name == kind:
            assert find_config(kind, path.stem).samefile(path)


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="pocket-lora"):
        find_config("train", "pocket-lorra")


def _bases(path: Path) -> list[tuple[str, str | None]]:
    """(base, revision) of each base that a file names."""
    values = load_yaml(path)
    named = values.get("bases", [{}]) if path.parent.name == "serve" else [values]
    return [(each.get("base", "pocket"), each.get("revision")) for each in named]


@pytest.mark.parametrize("kind", ["base", "fleet", "serve"])
def test_hub_bases_are_pinned_to_a_commit(kind: str) -> None:
    for path in (path for path in FILES if path.parent.name == kind):
        for base, revision in _bases(path):
            if "/" in base:
                assert revision, f"{path} names a Hub id without a commit"
                assert len(revision) == 40, f"{path}: {revision}"
                assert set(revision) <= set("0123456789abcdef"), f"{path}: {revision}"


def test_hub_bases_are_those_of_the_base_folder() -> None:
    known = {base for path in (CONFIGS / "base").glob("*.yaml") for base in _bases(path)}
    for path in (path for path in FILES if path.parent.name in ("fleet", "serve")):
        assert set(_bases(path)) <= known, path


def test_fleets_name_train_configs_that_exist() -> None:
    for path in (path for path in FILES if path.parent.name == "fleet"):
        fleet = load_config(FleetConfig, path)
        if isinstance(fleet.train, str):
            load_config(TrainConfig, find_config("train", fleet.train, path.parent))


def test_readme_has_a_row_for_each_folder() -> None:
    text = (CONFIGS / "README.md").read_text()
    for kind, parser in CLASSES.items():
        assert f"| `{kind}/` | `{parser.__name__}` |" in text


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"bases": [{"base": "a/tiny"}, {"base": "b/Tiny/"}]}, "two bases are called 'tiny'"),
        ({"bases": [{"replicas": {"min": 3, "max": 2}}]}, "min is 3 and max 2"),
        ({"bases": [{"replicas": 0}]}, "greater than or equal to 1"),
        ({"bases": []}, "at least 1 item"),
        ({"full": {"max_models": 0}}, "greater than or equal to 1"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(InputProblems, match=told):
        parse_config(ServeConfig, values, "test")
