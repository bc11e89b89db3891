"""A distribution in bounded memory against all its numbers in order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.replay.distribution import Distribution

SHARES = (0.0, 0.01, 0.5, 0.95, 0.99, 1.0)

weights = st.sampled_from([0.25, 0.5, 1.0, 3.0])
numbers = st.floats(-1e9, 1e9, allow_subnormal=False) | st.integers(-1000, 1000).map(float)


def distribution_of(pairs: Sequence[tuple[float, float]]) -> Distribution:
    found = Distribution()
    for value, weight in pairs:
        found.add(value, weight)
    return found


@given(st.lists(st.tuples(numbers, weights), min_size=1, max_size=60), st.sampled_from(SHARES))
def test_a_quantile_is_within_one_percent_of_the_number_itself(pairs: list[tuple[float, float]], share: float) -> None:
    wanted, seen = sum(weight for _, weight in pairs) * share, 0.0
    exact = max(value for value, _ in pairs)
    for value, weight in sorted(pairs):
        seen += weight
        if seen >= wanted:
            exact = value
            break
    found = distribution_of(pairs).quantile(share)
    assert found is not None
    assert math.isclose(found, exact, rel_tol=0.0101, abs_tol=1e-9)


@given(st.lists(st.tuples(numbers, weights), min_size=1, max_size=60), st.integers(1, 20))
def test_a_histogram_holds_all_the_weight_there_is(pairs: list[tuple[float, float]], bins: int) -> None:
    found = distribution_of(pairs)
    low, high = found.least, found.most
    edges = [low + (high - low) * index / bins for index in range(bins + 1)]
    assert sum(it.weight for it in found.histogram(edges)) == pytest.approx(sum(weight for _, weight in pairs))


def test_batches_count_once_whose_records_each_bring_their_share() -> None:
    found = distribution_of([(8.0, 1 / 64)] * 64 + [(2.0, 1.0)] * 2)
    assert found.weight == pytest.approx(3)
    assert found.quantile(0.5) == pytest.approx(2, rel=0.0101)
    assert found.quantile(0.99) == 8.0
    assert found.mean == pytest.approx(4)


def test_of_nothing_there_is_no_quantile() -> None:
    assert Distribution().quantile(0.5) is None
    assert Distribution().mean is None


def test_memory_does_not_grow_with_the_numbers() -> None:
    found = distribution_of([(1e-6 * 1.0001**index, 1.0) for index in range(200_000)])
    assert len(found._above) < 1_100  # only its size says so
