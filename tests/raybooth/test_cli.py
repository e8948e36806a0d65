"""The command line is a promise: its words, its exit codes, its errors without tracebacks."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from raybooth.cli import build_parser, main


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def test_the_commands_that_scripts_rely_on_are_there() -> None:
    found = commands(build_parser())
    assert set(found) == {
        *("check", "train", "models", "generate", "prior", "pocket", "serve"),
        *("export", "import", "evaluate", "bench", "extract", "keys", "replay"),
    }
    assert {"ls", "build", "gc"} <= set(commands(found["prior"]))
    assert {"draw", "pretrain", "path", "report"} <= set(commands(found["pocket"]))


@pytest.mark.parametrize(
    "words",
    [
        ["check", "fleet.yaml"],
        ["train", "fleet.yaml", "--json"],
        ["models", "--json"],
        ["prior", "ls", "--json"],
        ["export", "rex@2", "--format", "kohya", "-o", "rex.safetensors"],
        ["import", "rex.safetensors", "--subject", "rex", "--base", "pocket"],
        ["evaluate", "rex@2", "--json"],
        ["extract", "rex@2", "--rank", "16", "--targets", "all", "--as", "rex-lora", "--json"],
        ["models", "promote", "rex@2", "canary"],
        ["models", "rollback", "rex"],
        ["replay", "rex.png", "-o", "again.png", "--base", "pocket", "--json"],
        ["serve", "--host", "127.0.0.1", "--port", "8000", "--base", "pocket"],
        [
            *("generate", "rex@2", "a photo of sks dog", "--seed", "1", "--steps", "5"),
            *("--guidance", "3", "--solver", "euler", "-n", "2", "-o", "out.png"),
        ],
    ],
)
def test_the_options_that_scripts_rely_on_parse(words: list[str]) -> None:
    assert callable(build_parser().parse_args(words).run)


def test_input_errors_exit_with_2_and_say_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", "nobody"]) == 2
    assert "no subject 'nobody' is published" in capsys.readouterr().err


def test_unknown_words_exit_with_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["models", "--jason"])
    assert caught.value.code == 2


def test_building_the_parser_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from raybooth.cli import build_parser; build_parser(); "
        "print([name for name in ('torch', 'ray', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
