"""The mergeable distribution: what merging may not change, and how far quantiles may be off."""

from __future__ import annotations

import math
from fractions import Fraction

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.stats.histogram import LARGEST, RELATIVE_ERROR, SMALLEST, UNIT, Distribution

values = st.one_of(
    st.floats(min_value=0, max_value=LARGEST / 2),
    st.floats(min_value=0, max_value=10_000),
    st.sampled_from([0.0, SMALLEST, math.nextafter(SMALLEST, 1), 1.0, 12.5, 1e9]),
)
many = st.lists(values, max_size=60)


def of(numbers: list[float]) -> Distribution:
    it = Distribution()
    for number in numbers:
        it.add(number)
    return it


def merged(*some: Distribution) -> Distribution:
    it = Distribution()
    for other in some:
        it.merge(other)
    return it


@given(many, many, many)
def test_merging_is_associative_commutative_and_as_if_counted_together(
    a: list[float], b: list[float], c: list[float]
) -> None:
    left = merged(merged(of(a), of(b)), of(c)).state()
    assert left == merged(of(a), merged(of(b), of(c))).state()
    assert left == merged(of(c), of(a), of(b)).state()
    assert left == of([*b, *c, *a]).state()


@given(st.lists(values, min_size=1, max_size=200), st.floats(min_value=0, max_value=1))
def test_a_quantile_is_within_the_bound_of_the_true_one(numbers: list[float], q: float) -> None:
    true = sorted(numbers)[max(1, math.ceil(q * len(numbers))) - 1]
    found = of(numbers).quantile(q)
    assert found is not None
    assert abs(found - true) <= max(true * RELATIVE_ERROR * (1 + 1e-9), SMALLEST)


@pytest.mark.parametrize("exponent", [-2.9, -1.0, 0.0, 3.3, 9.0, 14.9])
def test_the_bound_is_reached_and_not_passed_around_a_buckets_ends(exponent: float) -> None:
    around = 10.0**exponent
    worst = 0.0
    for step in range(2_000):
        true = around * (1 + step / 20_000)
        it = of([true, true * 100])
        it.least = 0.0  # else the estimate of the only value would be the value itself
        found = it.quantile(0.5)
        assert found is not None
        worst = max(worst, abs(found - true) / true)
    assert 0.9 * RELATIVE_ERROR < worst <= RELATIVE_ERROR * (1 + 1e-9)


@given(many)
def test_count_sum_and_extremes_are_exact(numbers: list[float]) -> None:
    it = of(numbers)
    assert it.count == len(numbers) == it.buckets.total()
    assert it.units == sum(round(number / UNIT) for number in numbers)
    if numbers:
        assert (it.least, it.greatest) == (min(numbers), max(numbers))
        assert abs(Fraction(it.sum) - sum(map(Fraction, numbers))) <= len(numbers) * (UNIT + 1e-12 * max(numbers))
    else:
        assert it.quantile(0.5) is None


@given(many)
def test_a_state_survives_json_and_holds_everything(numbers: list[float]) -> None:
    it = of(numbers)
    again = Distribution.of_state(orjson.loads(orjson.dumps(it.state())))
    assert again.state() == it.state()
    assert [again.quantile(q) for q in (0, 0.5, 1)] == [it.quantile(q) for q in (0, 0.5, 1)]


def test_a_negative_value_counts_as_nothing_and_there_is_an_end_to_buckets() -> None:
    it = of([-5.0, *(10.0**exponent for exponent in range(-300, 300))])
    assert it.least == 0.0
    assert len(it.buckets) <= 1_040
