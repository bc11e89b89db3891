"""A processor in simulated time: what can be computed by hand, and what must hold of every run."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.runtime.batcher import Batcher
from streamproc.runtime.cost import CostModel
from streamproc.runtime.fairness import Fairness
from streamproc.runtime.limits import Limits
from streamproc.runtime.online_cost import OnlineCost
from streamproc.settings import BatchSettings
from streamproc.simulation.optimum import offline_optimum
from streamproc.simulation.simulator import Run, Workers, simulate
from streamproc.simulation.streams import DISTRIBUTIONS, Stream, at_once, poisson, synthetic_lengths

COST = CostModel(alpha_ms=5.0, gamma_ms=0.01)
Strategy = Literal["none", "fifo", "bucketed", "exact"]
STRATEGIES: tuple[Strategy, ...] = ("none", "fifo", "bucketed", "exact")


def batcher(strategy: Strategy = "fifo", *, max_size: int = 4, max_padded: int | None = None) -> Batcher:
    return Batcher(
        "task",
        BatchSettings(
            strategy=strategy, length="bytes", max_size=max_size, max_wait_ms=10, max_bytes=2**40, max_padded=max_padded
        ),
        itertools.count(1).__next__,
        cost=OnlineCost(COST, calibrated=True),
    )


def run(stream: Stream, it: Batcher, *, workers: int = 1, max_in_flight: int = 20_000, noise: float = 0.0) -> Run:
    return simulate({"task": (stream, it)}, Workers(COST, workers, noise, seed=3), max_in_flight=max_in_flight)["task"]


def test_a_record_alone_waits_and_runs() -> None:
    it = run(Stream([5.0], [100]), batcher())
    assert it.latencies_s == pytest.approx([0.016])
    assert (it.batches, it.padding_ratio) == (1, 1.0)
    assert it.worker_ms == pytest.approx(6.0)
    assert it.closed_by == {"wait": 1}
    assert it.seconds == pytest.approx(0.016)


def test_a_full_batch_does_not_wait_and_is_padded() -> None:
    it = run(at_once([100, 50, 50, 100]), batcher())
    assert it.latencies_s == pytest.approx([0.009] * 4)
    assert it.padding_ratio == pytest.approx(4 / 3)


def test_a_full_batch_queues_behind_one_that_runs_and_others_grow() -> None:
    """Two full batches at 0 s, one of them queued; the last record comes meanwhile and runs with the next."""
    it = run(Stream([0.0] * 8 + [0.001, 0.017], [100] * 10), batcher())
    assert it.batches == 3
    assert it.latencies_s[4:8] == pytest.approx([0.018] * 4)
    assert it.latencies_s[8:] == pytest.approx([0.018 + 0.007 - 0.001, 0.018 + 0.007 - 0.017])


def test_a_batch_that_was_queued_begins_at_once_and_one_that_was_not_is_on_its_way_for_a_while() -> None:
    stream = Stream([0.0] * 8 + [1.0], [100] * 9)
    it = simulate({"task": (stream, batcher())}, Workers(COST, handover_ms=2.0))["task"]
    assert it.latencies_s == pytest.approx([0.011] * 4 + [0.020] * 4 + [0.018])
    assert it.worker_ms == pytest.approx(9 + 9 + 6), "what it waits it does not compute"


def test_what_has_no_room_in_flight_waits_in_kafka_and_is_backlog() -> None:
    it = run(at_once([10] * 7), batcher(), max_in_flight=3)
    assert it.closed_by == {"backlog": 2, "wait": 1}
    assert it.batches == 3


def test_workers_work_side_by_side() -> None:
    assert run(at_once([100] * 8), batcher(), workers=2).seconds == pytest.approx(0.009)


def test_noise_is_seeded() -> None:
    one, again = (run(at_once([100] * 40), batcher(), noise=0.3) for _ in range(2))
    assert one.latencies_s == again.latencies_s
    assert one.worker_ms != pytest.approx(90.0, rel=0.001)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(
    records=st.lists(st.tuples(st.floats(0, 0.02), st.integers(1, 800)), min_size=1, max_size=60),
    workers=st.integers(1, 3),
    max_in_flight=st.integers(1, 70),
    max_padded=st.one_of(st.none(), st.integers(1, 3_000)),
)
@settings(max_examples=60, deadline=None)
def test_every_record_comes_out_once_and_no_faster_than_the_optimum(
    strategy: Strategy,
    records: list[tuple[float, int]],
    workers: int,
    max_in_flight: int,
    max_padded: int | None,
) -> None:
    arrivals = list(itertools.accumulate(gap for gap, _ in records))
    lengths = [length for _, length in records]
    it = run(Stream(arrivals, lengths), batcher(strategy, max_padded=max_padded), workers=workers,
             max_in_flight=max_in_flight)  # fmt: skip
    assert len(it.latencies_s) == it.records == len(records)
    assert it.length == sum(lengths)
    best = offline_optimum(lengths, COST, Limits(4, 2**40, max_padded=max_padded))
    assert it.worker_ms >= best.worker_ms * (1 - 1e-9)
    assert it.seconds * workers * 1_000 >= it.worker_ms * (1 - 1e-9)
    assert it.padding_ratio >= 1
    assert sum(it.closed_by.values()) == it.batches


def test_tasks_share_the_worker() -> None:
    lengths = synthetic_lengths("lognormal", 2_000, 1)
    light, heavy = poisson(lengths[:200], 30, 1), at_once(lengths)
    runs = {
        name: simulate(
            {"light": (light, batcher()), "heavy": (heavy, batcher())},
            Workers(COST),
            fairness=Fairness({"light": 1, "heavy": 1}) if name == "fair" else None,
        )
        for name in ("fair", "oldest")
    }
    assert all(len(it.latencies_s) == it.records for both in runs.values() for it in both.values())
    # By the age of the oldest record alone, the light one would wait until the heavy one's backlog is gone.
    assert runs["fair"]["light"].latency_ms(0.99) < runs["oldest"]["light"].latency_ms(0.99) / 10


def test_quantiles_of_latencies_are_values_that_occurred() -> None:
    it = Run(4, latencies_s=[0.004, 0.001, 0.003, 0.002])
    assert [it.latency_ms(quantile) for quantile in (0.0, 0.25, 0.5, 0.99, 1.0)] == [1.0, 1.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_synthetic_lengths_are_seeded_and_cut(distribution: str) -> None:
    one = synthetic_lengths(distribution, 1_000, 1, longest=200)
    assert one == synthetic_lengths(distribution, 1_000, 1, longest=200) != synthetic_lengths(distribution, 1_000, 2)
    assert min(one) >= 1
    assert max(one) == 200
    assert len(set(one)) > 20


def test_poisson_arrivals_have_their_rate() -> None:
    it = poisson([1] * 20_000, 50.0, 1)
    assert it.arrivals_s[0] == 0.0
    assert list(it.arrivals_s) == sorted(it.arrivals_s)
    assert 20_000 / it.arrivals_s[-1] == pytest.approx(50.0, rel=0.03)


def test_a_stream_has_records() -> None:
    with pytest.raises(ValueError, match="a record at least"):
        Stream([], [])


def test_the_optimum_is_the_exact_division() -> None:
    it = offline_optimum([100, 1, 100, 1], COST, Limits(2, 1))
    assert (it.batches, it.padding_ratio) == (2, 1.0)
    assert it.worker_ms == pytest.approx(12.02)
    assert it.per_s(2) == pytest.approx(4 * 2 / 12.02 * 1_000)
