"""Who asks, and how long they wait: what the gateway knows of a request beside its body."""

from __future__ import annotations

import math
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


def patience_s(asked_s: float | None, sdk_read_timeout: str | None) -> float | None:
    """Seconds to answer in, a tenth (at most one) less than the caller waits; None: it is not said.

    `asked_s` is its `x-request-timeout-seconds`, at which Ray Serve's proxy hangs up by itself;
    `sdk_read_timeout` the `x-stainless-read-timeout` of OpenAI's clients, which says nothing where
    it is not a number of seconds.
    """
    try:
        read_s = float(sdk_read_timeout or "inf")
    except ValueError:
        read_s = math.inf
    given = [s for s in (asked_s, read_s) if s is not None and 0 < s < math.inf]
    return min((s - min(1.0, s / 10) for s in given), default=None)
