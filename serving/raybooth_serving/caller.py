"""Who asks, and how long they wait: what the gateway knows of a request beside its body."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of one request, as the gateway tells it to the engine's replica."""

    tenant: str = ""
    """The id of the API key; fair queueing counts by it. Empty: keys are off."""

    key_name: str = ""
    """What people call that key; the prompt policy is told."""

    subjects: tuple[str, ...] = ("*",)
    """Globs of the subject ids that the key may see; to it, others are not there."""

    deadline_s: float | None = None
    """Seconds from its arrival that the answer is worth something; None: what the limits say."""
