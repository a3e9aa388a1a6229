"""What the holder of a key may use: requests and tokens a minute, requests at a time. Counted by each server alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from .api_errors import TooManyRequests


@dataclass(frozen=True)
class Limits:
    """None: unlimited."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrent_requests: int | None = None


class Bucket:
    """Fills at a steady rate up to what a minute brings (or one); full at first. It may be overdrawn."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._spent = 0.0
        self._seen = clock()

    def spend(self, amount: float) -> None:
        self._spent += amount

    def wait(self, rate: float | None) -> float:
        """Seconds until there is one, at `rate` a minute; 0 if there is. Without a rate nothing is counted."""
        now = self._clock()
        if rate is None:
            self._spent, self._seen = 0.0, now
            return 0.0
        self._spent = max(self._spent - (now - self._seen) * rate / 60, 0.0)
        self._seen = now
        return max(self._spent + 1.0 - max(rate, 1.0), 0.0) * 60 / rate


class Quota:
    """What one caller has used. `limits` may change at any time."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._requests, self._tokens = Bucket(clock), Bucket(clock)
        self._running = 0

    def enter(self) -> None:
        """Count a request that begins. Raises 429; then nothing was counted."""
        limits = self.limits
        if limits.concurrent_requests is not None and self._running >= limits.concurrent_requests:
            raise _refusal(f"{limits.concurrent_requests} requests at a time", 1.0)
        # What a request will use is known at its end: it may begin as long as there is anything left.
        if wait := self._tokens.wait(limits.tokens_per_minute):
            raise _refusal(f"{limits.tokens_per_minute:g} tokens a minute", wait)
        if wait := self._requests.wait(limits.requests_per_minute):
            raise _refusal(f"{limits.requests_per_minute:g} requests a minute", wait)
        self._requests.spend(1.0)
        self._running += 1

    def leave(self, tokens: int) -> None:
        """Count the end of a request that has entered, and what it used."""
        self._running -= 1
        self._tokens.spend(tokens)


def _refusal(limit: str, wait: float) -> TooManyRequests:
    headers = {"Retry-After": str(max(math.ceil(wait), 1))}
    return TooManyRequests(f"this key allows {limit}", code="rate_limit_exceeded", headers=headers)
