"""Prompt policies that a config can name."""

from __future__ import annotations


def no_cats(
    prompt: str, negative_prompt: str, subjects: tuple[str, ...], key_name: str
) -> str | None:
    """Refuses cats, and says what it was asked."""
    if "cat" not in prompt:
        return None
    return f"no cats for {key_name or 'nobody'} with {' '.join(subjects) or 'the base'}"


def broken(*asked: object) -> str | None:
    """Always crashes."""
    raise ZeroDivisionError("where the policy is kept")
