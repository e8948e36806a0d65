"""Errors that only an endpoint has; all others are `raybooth.errors`."""

from __future__ import annotations

from raybooth.errors import ServingError


class QueueFullError(ServingError):
    """The queue is full; `retry_after_s` is when room is expected."""

    code = "queue_full"

    def __init__(self, what: str, found: str, do: str, retry_after_s: int) -> None:
        Exception.__init__(self, what, found, do, retry_after_s)
        self.what, self.found, self.do = what, found, do
        self.retry_after_s = retry_after_s


class DeadlineError(ServingError):
    """A request took longer than the endpoint allows."""

    code = "timeout"


class TooLargeError(ServingError):
    """A request body is larger than the endpoint reads."""

    code = "request_too_large"
