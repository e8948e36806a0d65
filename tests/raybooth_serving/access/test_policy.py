"""The prompt policy: found, asked, obeyed, and closed when it breaks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from raybooth.errors import ConfigError
from raybooth_serving.access.policy import WORDS_FILE, check_prompt, listed_words, load_policy
from raybooth_serving.errors import ContentPolicyError

ASKED = ("a dog", "a cat", ("dog-a", "dog-b"), "studio")


def test_the_policy_hears_everything_and_lets_through() -> None:
    heard: list[Any] = []
    check_prompt(lambda *asked: heard.append(asked), *ASKED)
    assert heard == [ASKED]


def test_a_reason_refuses_and_is_told() -> None:
    with pytest.raises(ContentPolicyError, match="found no dogs today") as error:
        check_prompt(lambda *asked: "no dogs today", *ASKED)
    assert error.value.code == "content_policy_violation"


def test_a_refusal_may_be_raised() -> None:
    def policy(*asked: Any) -> str | None:
        raise ContentPolicyError("not here", "", "ask elsewhere")

    with pytest.raises(ContentPolicyError, match="not here; ask elsewhere"):
        check_prompt(policy, *ASKED)


def _crash(*asked: Any) -> str | None:
    raise ZeroDivisionError("the secret place of the policy")


def _no_answer(*asked: Any) -> Any:
    return True


def _other_arguments(prompt: str) -> str | None:
    return None


@pytest.mark.parametrize("policy", [_crash, _no_answer, _other_arguments])
def test_a_broken_policy_lets_nothing_through_and_says_so_in_the_log(
    policy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(ContentPolicyError, match="could not be checked") as error,
    ):
        check_prompt(policy, *ASKED)
    assert "refused" in caplog.text
    assert "secret place" not in str(error.value)


def test_policies_are_named_by_import_path() -> None:
    assert load_policy("raybooth_serving.access.policy:listed_words") is listed_words
    assert load_policy("builtins:print") is print


@pytest.mark.parametrize(
    "path",
    [
        "no_such_package.module:policy",
        "raybooth_serving.access.policy:no_such_policy",
        "raybooth_serving.access.policy:WORDS_FILE",
        "asyncio:open_connection",
    ],
)
def test_what_cannot_be_asked_is_refused_at_start(path: str) -> None:
    with pytest.raises(ConfigError, match=r"safety\.policy cannot be used"):
        load_policy(path)


@pytest.fixture
def words(raybooth_home: Path) -> None:
    raybooth_home.mkdir()
    (raybooth_home / WORDS_FILE).write_text("Gun\n\nblood  bath\n草刈り機\n", "utf-8")


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize(
    ("prompt", "is_refused"),
    [
        ("a dog with a gun", True),
        ("a dog, GUN.", True),
        ("a dog with a \uff47\uff55\uff4e", True),
        ("a blood\nbath", True),
        ("赤い 草刈り機", True),
        ("a gundog", False),
        ("a bath of blood", False),
        ("a dog", False),
    ],
)
def test_listed_words_are_refused_whole(prompt: str, is_refused: bool) -> None:
    assert (listed_words(prompt, "gun", (), "") is not None) == is_refused


def test_a_missing_list_lets_nothing_through() -> None:
    with pytest.raises(ContentPolicyError, match="could not be checked"):
        check_prompt(listed_words, *ASKED)
