"""Errors that only an endpoint has; all others are `raybooth.errors`."""

from __future__ import annotations

from raybooth.errors import InputError, RequestError, ServingError, StoreError


class QueueFullError(ServingError):
    """The queue is full; `retry_after_s` is when room is expected."""

    code = "queue_full"

    def __init__(self, what: str, found: str, do: str, retry_after_s: int) -> None:
        Exception.__init__(self, what, found, do, retry_after_s)
        self.what, self.found, self.do = what, found, do
        self.retry_after_s = retry_after_s


class NoReplicaError(ServingError):
    """No engine can take a request now; `retry_after_s` is when one may be back."""

    code = "no_replica"

    def __init__(self, what: str, found: str, do: str, retry_after_s: int) -> None:
        Exception.__init__(self, what, found, do, retry_after_s)
        self.what, self.found, self.do = what, found, do
        self.retry_after_s = retry_after_s


class ReplicaDiedError(NoReplicaError):
    """The replica that worked on a request is gone, and its images with it."""

    code = "replica_died"


class DeadlineError(ServingError):
    """A request took longer than the endpoint allows."""

    code = "timeout"


class StoreAwayError(StoreError):
    """The store cannot be read now, and what was asked for is not in memory."""

    code = "store_away"


class TooLargeError(ServingError):
    """A request body is larger than the endpoint reads."""

    code = "request_too_large"


class KeyReusedError(InputError):
    """An Idempotency-Key that belongs to another request."""

    code = "idempotency_key_reused"


class AuthError(InputError):
    """A request without an API key that counts."""

    code = "invalid_api_key"


class RateError(QueueFullError):
    """An API key has asked for more than it may for now; `retry_after_s` is when it may again."""

    code = "rate_limit_exceeded"


class ContentPolicyError(RequestError):
    """A prompt that this endpoint does not draw."""

    code = "content_policy_violation"


class UnfitImageError(ContentPolicyError):
    """An image that was made and is not sent."""


def too_late() -> DeadlineError:
    """Images that were not ready in time."""
    do = "allow more time, or ask for fewer or smaller images"
    return DeadlineError("the images took too long", "past their deadline", do)
