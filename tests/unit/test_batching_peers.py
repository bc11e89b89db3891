"""The benchmark's rules of others: each decides as its project says; and what the benchmark computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.batching import RULES, median, missed, one, settings
from benchmarks.batching_peers import Beam, BentoMl, Infinity, Peer, Tei
from streamproc.records import Batch, Span
from streamproc.simulation.streams import synthetic_lengths
from tests.support.spans import lease, span

LEASE = lease()
PEERS: list[Callable[..., Any]] = [Tei, Infinity, Beam, BentoMl]


def records(first: int, lengths: list[int], *, at: float = 0.0) -> Span:
    it = span(LEASE, first, len(lengths), arrived_at=at)
    return Span(it.lease, it.first, it.records, it.sizes, at, lengths)


def lengths_of(batch: Batch) -> list[int]:
    return [length for part in batch.spans for length in part.lengths or ()]


def test_tei_takes_the_oldest_while_the_padded_length_allows_and_waits_for_nothing() -> None:
    it = Tei(settings("fifo"))
    it.add(records(0, [1_000] * 17))
    assert it.due(0.0, backlog=False) == "free"
    assert [len(lengths_of(it.take(0.0, "free"))) for _ in range(2)] == [16, 1]


def test_infinity_sorts_up_to_eight_batches_and_runs_them_all_before_it_looks_again() -> None:
    it = Infinity(settings("fifo"))
    it.add(records(0, [100, 1] * 64))
    assert lengths_of(it.take(0.0, "free")) == [1] * 64
    it.add(records(128, [5]))
    assert lengths_of(it.take(0.0, "free")) == [100] * 64
    assert lengths_of(it.take(0.0, "free")) == [5]


def test_infinity_does_not_sort_less_than_two_batches() -> None:
    it = Infinity(settings("fifo"))
    it.add(records(0, [100, 1] * 32))
    assert lengths_of(it.take(0.0, "free")) == [100, 1] * 32


def test_beam_has_a_timer_for_each_bucket() -> None:
    it = Beam(settings("fifo"))
    it.add(records(0, [10, 200, 12], at=1.0))
    it.add(records(3, [250], at=1.005))
    assert it.due(1.009, backlog=False) is None
    assert it.deadline == 1.01
    assert it.due(1.01, backlog=False) == "bucket"
    assert [lengths_of(it.take(1.01, "bucket")) for _ in range(2)] == [[10, 12], [200, 250]]


def test_beam_does_not_wait_with_a_full_bucket() -> None:
    it = Beam(settings("fifo"))
    it.add(records(0, [200] * 64))
    assert it.due(0.0, backlog=False) == "bucket"


def test_bentoml_waits_on_as_long_as_its_mean_wait_says_that_it_pays() -> None:
    it = BentoMl(settings("fifo"))
    it.add(records(0, [10]))
    assert it.due(0.0, backlog=False) is None, "(tick + a) is less than the mean wait at first"
    assert it.deadline == 0.001
    it.add(records(1, [10] * 20))
    assert it.due(0.001, backlog=False) == "cork"
    for size in (1, 21) * 30:
        batch = Batch(1, "peer", [], 0.0, 0.0, "cork", 0.0)
        batch.size = size
        it.ran(batch, 2.0 * size + 5.0)
    assert it.per_record_s == pytest.approx(0.002)
    assert it.mean_wait_s == 0.0


@pytest.mark.parametrize("peer", PEERS)
def test_every_rule_runs_every_record_once_within_the_limits(peer: Callable[..., Peer]) -> None:
    lengths = synthetic_lengths("pareto", 1_000, 1, longest=1_024)
    for rate in (None, 200.0):
        run = one(lengths, rate, lambda: peer(settings("fifo")), 1)  # type: ignore[arg-type, return-value] # each of them
        assert run.padded <= run.batches * 16_384


def test_the_rules_of_the_benchmark_lose_nothing() -> None:
    for rule in RULES.values():
        one(synthetic_lengths("bimodal", 300, 2), None, rule, 1)


def test_a_median_is_none_where_most_runs_have_no_figure() -> None:
    assert median([1.0, None, 3.0]) == 2.0
    assert median([1.0, None, None]) is None


def test_a_missed_target_is_named() -> None:
    good = {"throughput": 0.95, "padding": 1.05, "p99_ms": 26.0, "low_load": 1.0}
    for name, value in (
        ("throughput", 0.92),
        ("padding", 1.11),
        ("p99_ms", None),
        ("p99_ms", 31.0),
        ("low_load", 1.03),
    ):
        figures = {"simulated": {"pareto": {"bucketed": {**good, name: value}}}, "two_tasks": {"light, fair": 1.5}}
        (failure,) = missed(figures)
        assert failure.startswith(f"pareto, {name}: ")
    assert missed({"simulated": {"pareto": {"bucketed": good}}, "two_tasks": {"light, fair": 1.5}}) == []
    assert len(missed({"simulated": {}, "two_tasks": {"light, fair": 2.5}})) == 1
