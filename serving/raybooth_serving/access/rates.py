"""Images a minute, one token bucket an API key; pure, told the time.

A bucket holds at most one minute's images and fills steadily. A request is let in when the bucket
holds its images, or is full; what it takes beyond the bucket is paid back first. So a request for
more than a minute's images waits for a full bucket, and no request waits for ever.

This bounds how much a key may ask for; whose rows go first among those let in is the scheduler's
to decide (`Order.tenant` is the key's id). Buckets live in one gateway process and start full.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Bucket:
    images: float
    filled_s: float


class Rates:
    """What each key has left."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key_id: str, num_images: int, per_minute: float, now_s: float) -> float:
        """0.0 and the images are taken, or the seconds until they can be; `now_s` is monotonic."""
        size = max(1.0, per_minute)
        bucket = self._buckets.setdefault(key_id, _Bucket(size, now_s))
        gained = max(0.0, now_s - bucket.filled_s) * per_minute / 60
        bucket.images = min(size, bucket.images + gained)
        bucket.filled_s = max(now_s, bucket.filled_s)
        missing = min(num_images, size) - bucket.images
        if missing > 1e-9:
            return missing * 60 / per_minute
        bucket.images -= num_images
        return 0.0

    def give_back(self, key_id: str, num_images: int) -> None:
        """Images that were taken and not made; the next `take` caps the bucket."""
        self._buckets[key_id].images += num_images
