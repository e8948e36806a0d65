"""The house rules that no linter knows: source roots, names, sizes, and who may load what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import raybooth

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "platform" / "raybooth", ROOT / "serving" / "raybooth_serving")
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BANNED = {"util", "helper", "manager", "common", "misc", "core", "handler", "processor"}
MAX_LINES = 400
HEAVY = ("torch", "ray", "diffusers", "transformers", "deepspeed", "bitsandbytes")
PURE_MODULES = (
    "raybooth",
    "raybooth.errors",
    "raybooth.reading",
    "raybooth.config",
    "raybooth.subject",
    "raybooth.store",
    "raybooth.home",
    "raybooth.fleet.queue",
    "raybooth.fleet.planner",
    "raybooth.fleet.memory",
    "raybooth.fleet.growth",
    "raybooth_serving.errors",
    "raybooth_serving.wire.api",
    "raybooth_serving.engine.slots",
    "raybooth_serving.engine.scheduler",
    "raybooth_serving.engine.shares",
    "raybooth_serving.engine.step_profile",
    "raybooth_serving.engine.admission",
    "raybooth_serving.engine.forecast",
    "raybooth_serving.scale.directory",
    "raybooth_serving.scale.scaling",
    "raybooth_serving.scale.spill",
    "raybooth_serving.access.keys",
    "raybooth_serving.access.rates",
    "raybooth_serving.access.policy",
    "raybooth_serving.access.auth",
)
RAY_FILES = {
    "platform/raybooth/fleet/dispatcher.py",
    "platform/raybooth/fleet/evaluation_cluster.py",
    "platform/raybooth/fleet/launch.py",
    "platform/raybooth/fleet/trainer.py",
    "platform/raybooth/data/prior_cluster.py",
    "serving/raybooth_serving/app.py",
    "serving/raybooth_serving/scale/gateway.py",
    "serving/raybooth_serving/scale/prometheus.py",
    "serving/raybooth_serving/scale/router.py",
}
STDLIB_NAMES_ALLOWED = {"platform/raybooth/fleet/queue.py"}


def _short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ------------------------------------------------------------------ source roots


@pytest.mark.parametrize("root", ["platform", "serving"])
def test_source_root_is_no_package(root: str) -> None:
    """With platform/__init__.py `import platform` would no longer be the standard library's."""
    assert not (ROOT / root / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_source_root_holds_one_package_and_a_readme(package: Path) -> None:
    entries = {
        path.name
        for path in package.parent.iterdir()
        if path.suffix != ".png" and not path.name.startswith((".", "__pycache__"))
    }
    assert entries == {package.name, "README.md"}


def test_import_platform_is_the_standard_library() -> None:
    code = "import platform; print(platform.system()); import platform as p; print(p.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    system, file = result.stdout.splitlines()
    assert system
    assert ROOT not in Path(file).parents


def test_no_module_is_named_like_the_standard_library() -> None:
    every = {path for path in SOURCES if path.name != "__init__.py"}
    every |= {path.parent for path in SOURCES}
    named = {_short(path) for path in every if path.stem in sys.stdlib_module_names}
    assert named <= STDLIB_NAMES_ALLOWED


def test_every_folder_of_a_package_is_a_package() -> None:
    for package in PACKAGES:
        folders = {path.parent for path in package.rglob("*.py")}
        assert all((folder / "__init__.py").exists() for folder in folders)
        assert (package / "py.typed").exists()


# ------------------------------------------------------------------ names and sizes


def _words(name: str) -> set[str]:
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)
    words = {part.lower() for part in parts}
    return words | {word.removesuffix("s") for word in words}


@pytest.mark.parametrize(
    ("name", "is_banned"),
    [
        ("image_utils", True),
        ("SlotManager", True),
        ("HTTPHandler", True),
        ("core", True),
        ("score", False),
        ("Scorecard", False),
        ("slots", False),
    ],
)
def test_banned_words_are_found(name: str, is_banned: bool) -> None:
    assert bool(_words(name) & BANNED) == is_banned


def test_no_banned_word_in_a_file_name() -> None:
    named = {_short(p) for p in [*SOURCES, *TESTS] if _words(p.stem) & BANNED}
    named |= {_short(p.parent) for p in [*SOURCES, *TESTS] if _words(p.parent.name) & BANNED}
    assert not named


def test_no_banned_word_in_a_class_name() -> None:
    named = {
        f"{_short(path)}: {node.name}"
        for path in [*SOURCES, *TESTS]
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ClassDef) and _words(node.name) & BANNED
    }
    assert not named


def test_no_file_is_long() -> None:
    lengths = {_short(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


# ------------------------------------------------------------------ who may load what


def _imported(path: Path) -> Iterator[str]:
    """Every absolute module name that a file imports, inside functions too."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def test_ray_is_imported_where_the_design_says() -> None:
    users = {
        _short(path)
        for path in SOURCES
        if any(name.split(".")[0] == "ray" for name in _imported(path))
    }
    assert users <= RAY_FILES


def test_imports_are_absolute() -> None:
    relative = {
        _short(path)
        for path in SOURCES
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    }
    assert not relative


def _heavy_after(code: str) -> list[str]:
    """Heavy modules that are loaded once `code` has run in a fresh interpreter."""
    paths = [str(package.parent) for package in PACKAGES]
    check = f"print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    full = f"import sys; sys.path[:0] = {paths!r}\n{code}\n{check}"
    result = subprocess.run([sys.executable, "-c", full], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_pure_modules_load_neither_torch_nor_ray() -> None:
    together = "\n".join(f"import {name}" for name in PURE_MODULES)
    if _heavy_after(together):
        guilty = {name: _heavy_after(f"import {name}") for name in PURE_MODULES}
        assert {name: heavy for name, heavy in guilty.items() if heavy} == {}


def test_command_line_is_built_without_torch_or_ray() -> None:
    assert _heavy_after("from raybooth.cli import build_parser; build_parser()") == []


def test_heavy_modules_would_be_seen() -> None:
    assert _heavy_after("sys.modules['torch'] = sys") == ["torch"]


# ------------------------------------------------------------------ one version


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert released, "CHANGELOG.md lists no version"
    assert project["version"] == raybooth.__version__ == released[0]


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
