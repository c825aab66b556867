"""A caller may ask as often as its rate says, some at once, and hears when to come back."""

import pytest

from model.errors import RateLimited
from service.door.quotas import Quotas


def test_a_burst_then_the_rate() -> None:
    quotas = Quotas()
    for _ in range(3):
        quotas.take("a", 0.5, 3, 100.0)
    with pytest.raises(RateLimited) as caught:
        quotas.take("a", 0.5, 3, 100.0)
    assert caught.value.retry_after_s == 2
    with pytest.raises(RateLimited) as caught:
        quotas.take("a", 0.5, 3, 101.5)
    assert caught.value.retry_after_s == 1
    quotas.take("a", 0.5, 3, 102.0)
    with pytest.raises(RateLimited):
        quotas.take("a", 0.5, 3, 102.0)


def test_callers_are_counted_apart_and_idle_ones_fill_up_to_the_burst() -> None:
    quotas = Quotas()
    quotas.take("a", 1.0, 1, 0.0)
    quotas.take("b", 1.0, 1, 0.0)
    quotas.take("a", 1.0, 1, 1_000.0)
    with pytest.raises(RateLimited):
        quotas.take("a", 1.0, 1, 1_000.0)


def test_a_rate_of_zero_is_no_limit() -> None:
    quotas = Quotas()
    for _ in range(1_000):
        quotas.take("a", 0.0, 1, 0.0)


def test_strangers_without_end_take_bounded_memory() -> None:
    quotas = Quotas()
    for stranger in range(10_500):
        quotas.take(str(stranger), 1.0, 1, 0.0)
    assert len(quotas._buckets) == 10_000
    quotas.take("0", 1.0, 1, 0.0)  # forgotten
    with pytest.raises(RateLimited):
        quotas.take("10499", 1.0, 1, 0.0)
