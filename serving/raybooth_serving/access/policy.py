"""The prompt policy: a callable of the platform team's, asked before anything is queued.

`safety.policy: package.module:callable` names it. It is called in a thread of its own as
`callable(prompt, negative_prompt, subjects, key_name)` (subjects: a tuple of ids, empty for the
plain base; key_name: empty where no keys are asked for) and returns None, or the reason why not as
text that the caller will read. Whatever else it does refuses the prompt: a policy that is broken
lets nothing through.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import unicodedata
from collections.abc import Callable, Sequence

from raybooth.errors import ConfigError
from raybooth.home import home
from raybooth_serving.errors import ContentPolicyError

Policy = Callable[[str, str, tuple[str, ...], str], str | None]
WORDS_FILE = "refused-words.txt"

logger = logging.getLogger(__name__)


def load_policy(path: str) -> Policy:
    """The callable of `package.module:callable`; raises ConfigError when there is none."""
    module_name, _, name = path.partition(":")
    what, do = "safety.policy cannot be used", "name a function as package.module:callable"
    try:
        policy = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(what, f"{path}: {error}", do) from error
    if not callable(policy) or inspect.iscoroutinefunction(policy):
        raise ConfigError(what, f"{path} is {type(policy).__name__}", f"{do}, not async")
    loaded: Policy = policy
    return loaded


def check_prompt(
    policy: Policy, prompt: str, negative_prompt: str, subjects: Sequence[str], key_name: str
) -> None:
    """Raises ContentPolicyError unless `policy` lets the prompt through."""
    what = "this prompt is against the policy of this endpoint"
    try:
        reason = policy(prompt, negative_prompt, tuple(subjects), key_name)
    except ContentPolicyError:
        raise
    except Exception as error:  # whatever a policy raises, the prompt is refused
        logger.exception("the prompt policy crashed; the request is refused")
        raise _unchecked() from error
    if reason is None:
        return
    if not isinstance(reason, str):
        logger.error("the prompt policy returned %r, not None or text; refused", type(reason))
        raise _unchecked()
    logger.info("the prompt policy refused a request of key %r: %s", key_name, reason)
    raise ContentPolicyError(what, reason, "ask for something else")


def listed_words(
    prompt: str, negative_prompt: str, subjects: tuple[str, ...], key_name: str
) -> str | None:
    """A policy: refuses prompts with a line of RAYBOOTH_HOME/refused-words.txt in them.

    One word or phrase a line; whole words, in any case and form of Unicode. Negative prompts, which
    name what shall not be seen, are free.
    """
    text = _plain(prompt)
    for line in (home() / WORDS_FILE).read_text("utf-8").splitlines():
        phrase = _plain(line)
        if phrase and re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text):
            return f"it holds {line.strip()!r}"
    return None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _unchecked() -> ContentPolicyError:
    what = "this prompt could not be checked against the policy of this endpoint"
    return ContentPolicyError(what, "", "tell those who run it; its log says why")
