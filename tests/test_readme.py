"""The READMEs tell the truth: the tree is the repository, the commands are the CLI's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from raybooth.cli import build_parser
from raybooth.config import FleetConfig, TrainConfig, parse_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDERS = ("platform", "serving", "cluster", "configs")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / name / "README.md" for name in FOLDERS)])
COMMAND_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------ the tree


def _tree_paths(text: str) -> Iterator[str]:
    """The paths of an indented tree; a line may name several files, then says what they are."""
    folders: list[str] = []
    for line in text.splitlines():
        names = re.match(r"( *)([\w.\-/]+(?:, [\w.\-/]+)*)(?:  |$)", line)
        if not names:
            continue
        folders = folders[: len(names[1]) // 2]
        for name in names[2].split(", "):
            yield "/".join([*folders, name.rstrip("/")])
        if names[2].endswith("/"):
            folders.append(names[2].rstrip("/"))


def _ignored() -> list[str]:
    lines = (ROOT / ".gitignore").read_text().split()
    return [".git", *(line.rstrip("/") for line in lines if not line.startswith("#"))]


@pytest.fixture(scope="module")
def tree() -> set[str]:
    (block,) = _blocks(README.read_text(), "text")
    paths = list(_tree_paths(block))
    assert len(paths) == len(set(paths)), "a path is in the tree twice"
    return set(paths)


def test_tree_is_read_by_indentation() -> None:
    text = "a/\n  b.py, c.py    two\n  d/          deep\n    e.py\nf.py  last\n"
    assert list(_tree_paths(text)) == ["a", "a/b.py", "a/c.py", "a/d", "a/d/e.py", "f.py"]


def test_every_path_of_the_tree_exists(tree: set[str]) -> None:
    assert {path for path in tree if not (ROOT / path).exists()} == set()


def test_tree_has_every_entry_of_the_root(tree: set[str]) -> None:
    ignored = _ignored()
    entries = {
        path.name
        for path in ROOT.iterdir()
        if not any(fnmatch(path.name, pattern) for pattern in ignored)
    }
    assert entries - {".gitignore", ".dockerignore"} <= tree


def test_tree_has_every_module(tree: set[str]) -> None:
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("platform/raybooth", "serving/raybooth_serving")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert modules - tree == set()


def test_tree_has_every_manifest_and_config(tree: set[str]) -> None:
    files = [*(ROOT / "cluster").iterdir(), *(ROOT / "configs").glob("*/*.yaml")]
    assert {path.relative_to(ROOT).as_posix() for path in files} - tree == set()


# ------------------------------------------------------------------ commands and links


def _commands(text: str) -> Iterator[list[str]]:
    """Every `raybooth ...` of shell blocks and code spans, as words.

    A span may name a command without its arguments; that one asks for its help.
    """
    for block in _blocks(text, "sh"):
        for line in block.splitlines():
            found = re.search(r"(?:^|-- )(raybooth .*)$", line.strip())
            if found:
                yield shlex.split(found[1], comments=True)[1:]
    for span in re.findall(
        r"`raybooth ([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    ):
        is_name = re.fullmatch(r"[a-z]+( [a-z]+)?", span)
        yield [*shlex.split(span), *(["--help"] if is_name else [])]


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_are_the_parsers(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in _commands(page.read_text()):
        try:
            build_parser().parse_args(words)
        except SystemExit as stop:
            if stop.code != 0:  # --help and --version end with 0
                pytest.fail(f"raybooth {shlex.join(words)}: {capsys.readouterr().err}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("`raybooth tarin`", ["tarin", "--help"]),
        ("`raybooth tarin FLEET`", ["tarin", "FLEET"]),
        ("```sh\nraybooth models --jsn  # a comment\n```\n", ["models", "--jsn"]),
        ("```sh\nray job submit -- raybooth train\n```\n", ["train"]),
    ],
)
def test_wrong_commands_are_found(text: str, words: list[str]) -> None:
    assert list(_commands(text)) == [words]
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(words)
    assert stop.value.code == 2


def test_readme_names_every_command() -> None:
    text = README.read_text()
    for command in ("check", "train", "models", "generate", "serve", "prior", "pocket"):
        assert f"raybooth {command}" in text, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#:\s]+)\)", text)
    assert {link for link in links if not (page.parent / link).exists()} == set()


def test_fleet_files_of_the_readme_are_valid() -> None:
    from io import StringIO

    from ruamel.yaml import YAML

    blocks = _blocks(README.read_text(), "yaml")
    assert blocks
    for block in blocks:
        values = YAML(typ="safe", pure=True).load(StringIO(block))
        fleet = parse_config(FleetConfig, values, "README.md")
        for subject in fleet.subjects:
            parse_config(TrainConfig, subject.overrides, "README.md")
