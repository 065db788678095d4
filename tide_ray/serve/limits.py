"""How often a key may come: a token bucket each."""

from __future__ import annotations

import time
from collections.abc import Callable


class RateLimit:
    """Requests per minute of each key, a minute's worth at once at most.

    Args:
        per_minute: None allows any number.
        clock: seconds, monotonic.
    """

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # what is left, and when that was true

    def take(self, owner: str) -> float:
        """Count one request. Returns 0 if it may pass, else the seconds after which one may; that one is not counted.

        ``owner`` comes from a key that was checked, so there are as many buckets as keys.
        """
        if self._per_minute is None:
            return 0.0
        now, most = self._clock(), max(1.0, self._per_minute)
        left, since = self._buckets.get(owner, (most, now))
        left = min(most, left + (now - since) * self._per_minute / 60)
        if left < 1:
            self._buckets[owner] = left, now
            return (1 - left) * 60 / self._per_minute
        self._buckets[owner] = left - 1, now
        return 0.0
