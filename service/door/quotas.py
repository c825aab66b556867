"""How often each caller may ask."""

import math
from collections import OrderedDict
from dataclasses import dataclass

from model.errors import RateLimited

_MOST_OWNERS = 10_000
"""Addresses have no bound: the one that was idle longest is forgotten, its allowance is full by then."""


@dataclass(kw_only=True)
class _Bucket:
    tokens: float
    filled: float


class Quotas:
    """A token bucket for every caller; `now` is any clock in seconds."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, owner: str, rate_per_s: float, burst: int, now: float) -> None:
        """One request of `owner`, who has `rate_per_s` on average and `burst` at once; a rate of 0 is no limit.

        Raises RateLimited, with the seconds until the next request may come.
        """
        if rate_per_s <= 0.0:
            return
        bucket = self._buckets.pop(owner, None) or _Bucket(tokens=burst, filled=now)
        bucket.tokens = min(float(burst), bucket.tokens + (now - bucket.filled) * rate_per_s)
        bucket.filled = now
        self._buckets[owner] = bucket
        if len(self._buckets) > _MOST_OWNERS:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1.0:
            raise RateLimited(
                f"more than {rate_per_s:g} requests a second, {burst} at once: slow down",
                retry_after_s=max(1, math.ceil((1.0 - bucket.tokens) / rate_per_s)),
            )
        bucket.tokens -= 1.0
