"""Quantiles of what a status tells by size."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.observe.histogram import Histogram
from streamproc.observe.metric_table import TIME_BUCKETS
from streamproc.observe.status import EXAMPLE, quantile


def test_the_values_of_a_bucket_are_taken_to_be_spread_evenly() -> None:
    buckets = [(10.0, 20.0, 8), (40.0, 80.0, 2)]
    assert quantile(buckets, 0.4) == 15.0
    assert quantile(buckets, 0.8) == 20.0
    assert quantile(buckets, 0.9) == 60.0
    assert quantile(buckets, 1.0) == 80.0


def test_values_without_a_limit_are_at_the_lower_bound_of_their_bucket() -> None:
    assert quantile([(0.0, 1.0, 1), (600.0, None, 99)], 0.99) == 600.0


def test_nothing_has_no_quantile() -> None:
    assert quantile([], 0.5) is None
    assert quantile([(1.0, 2.0, 0)], 0.5) is None


def test_buckets_of_several_replicas_are_one() -> None:
    assert quantile([(1.0, 2.0, 3), (0.0, 1.0, 4), (1.0, 2.0, 1)], 0.75) == 1.5


@given(st.lists(st.floats(0.0, 700.0), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_a_quantile_is_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    histogram = Histogram(TIME_BUCKETS)
    for value in values:
        histogram.observe(value)
    bounds = [0.0, *TIME_BUCKETS, math.inf]
    true = sorted(values)[math.ceil(share * len(values)) - 1]
    (low, high) = next((low, high) for low, high in pairwise(bounds) if true <= high)
    found = quantile(histogram.held(), share)
    assert found is not None
    assert low <= found <= high


def test_the_quantiles_of_the_example_are_those_of_its_buckets() -> None:
    latency = EXAMPLE.tasks["text"].latency_ms
    assert latency.count == sum(count for *_, count in latency.buckets)
    assert latency.p50 == pytest.approx(quantile(latency.buckets, 0.5), abs=0.001)
    assert latency.p99 == pytest.approx(quantile(latency.buckets, 0.99), abs=0.01)
