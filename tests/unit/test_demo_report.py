"""The demo's figures: what they are computed from, and that nothing missing, repeated or failed goes unseen."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from streamproc.demo.report import Tally, spread, why_incomplete


def result(offset: int, *, partition: int = 0, digit: int = 3, label: int | None = 3) -> bytes:
    return orjson.dumps(
        {
            "result": {"id": offset, "label": label, "digit": digit, "probability": 0.9},
            "metrics": {},
            "source": {"topic": "digits", "partition": partition, "offset": offset, "timestamp": 1_000 + offset},
            "task": "digits",
        }
    )


def batch(size: int, execute: float = 2.0, **fields: Any) -> bytes:
    times = {"preprocess": 0.1, "transform_inputs": None, "execute": execute, "transform_outputs": 0.2}
    metrics = {"batch_size": size, "execution_times": times, "total_execution_time": execute + 0.3, "queue_time": 5.0}
    return orjson.dumps({"records": size, "closed_by": "size", **metrics, **fields})


def tally_of(*offsets: int) -> Tally:
    tally = Tally()
    for offset in offsets:
        tally.add_result(result(offset), 2_000 + offset)
    return tally


def test_a_run_with_one_result_for_each_record_is_complete() -> None:
    figures = tally_of(0, 1, 2).figures({0: 3}, workers=1)
    assert (figures["records"], figures["results"], figures["with_one_result"]) == (3, 3, 3)
    assert why_incomplete(figures) is None


def test_a_record_without_a_result_is_missed() -> None:
    figures = tally_of(0, 2).figures({0: 3}, workers=1)
    assert (figures["results"], figures["missing"]) == (2, 1)
    assert "1 have none" in (why_incomplete(figures) or "")


def test_a_repeated_result_does_not_make_up_for_a_missing_one() -> None:
    figures = tally_of(0, 1, 1).figures({0: 3}, workers=1)
    assert (figures["records"], figures["results"]) == (3, 3)
    assert (figures["missing"], figures["repeated"], figures["with_one_result"]) == (1, 1, 1)
    assert why_incomplete(figures) is not None


def test_records_of_different_partitions_are_told_apart() -> None:
    tally = tally_of(0)
    tally.add_result(result(0, partition=1), 2_000)
    assert why_incomplete(tally.figures({0: 1, 1: 1}, workers=1)) is None


def test_the_first_dead_letter_says_why_the_run_failed() -> None:
    tally = tally_of(0)
    tally.add_dead_letter([("streamproc-error-type", b"ValueError"), ("streamproc-error-message", b"not 64 pixels")])
    tally.add_dead_letter([("streamproc-error-type", b"Later"), ("streamproc-error-message", b"another")])
    reason = why_incomplete(tally.figures({0: 3}, workers=1)) or ""
    assert "2 dead letters (the first: ValueError: not 64 pixels)" in reason


def test_the_run_is_settled_once_records_and_batches_are_all_accounted_for() -> None:
    tally = tally_of(0, 1)
    assert not tally.is_settled(2), "no batch has been reported"
    tally.add_metrics(batch(2))
    assert tally.is_settled(2)
    assert not tally.is_settled(3)
    tally.add_dead_letter([])
    tally.add_metrics(batch(1))
    assert tally.is_settled(3)


def test_accuracy_counts_the_labelled_records_only() -> None:
    tally = Tally()
    for offset, (digit, label) in enumerate([(1, 1), (2, 2), (3, 3), (4, 5), (6, None)]):
        tally.add_result(result(offset, digit=digit, label=label), 2_000)
    assert tally.figures({0: 5}, workers=1)["accuracy"] == 0.75


def test_throughput_is_from_the_first_record_to_the_last_result_whatever_the_order_of_reading() -> None:
    figures = tally_of(9, 0, 5).figures({0: 10}, workers=1)
    assert figures["seconds"] == pytest.approx(1.009)  # from 1,000 ms to 2,009 ms
    assert figures["records_per_s"] == pytest.approx(3 / 1.009, abs=0.1)


def test_times_and_sizes_are_those_of_the_metrics_topic() -> None:
    tally = Tally()
    for size, execute in ((64, 1.0), (64, 2.0), (5, 9.0)):
        tally.add_metrics(batch(size, execute))
    figures = tally.figures({}, workers=2)
    assert figures["step_times_ms"]["execute"] == {"median": 2.0, "p99": 9.0}
    assert figures["step_times_ms"]["transform_inputs"] == {"median": None, "p99": None}
    assert figures["queue_time_ms"] == {"median": 5.0, "p99": 5.0}
    assert figures["batch_sizes"] == {"median": 64, "max": 64}
    assert figures["closed_by"] == {"size": 3}
    assert (figures["metrics_batches"], figures["metrics_records_total"], figures["workers"]) == (3, 133, 2)
    assert tally.latest_batch_size == 5


def test_a_batch_that_failed_before_the_backend_is_counted_without_times() -> None:
    tally = Tally()
    tally.add_metrics(orjson.dumps({"records": 7, "batch_size": 0, "closed_by": "wait"}))
    figures = tally.figures({}, workers=1)
    assert figures["metrics_records_total"] == 7
    assert figures["step_times_ms"]["total"] == {"median": None, "p99": None}


def test_a_run_that_wrote_nothing_has_figures_too() -> None:
    figures = Tally().figures({0: 2}, workers=1)
    assert (figures["results"], figures["missing"], figures["accuracy"]) == (0, 2, None)
    assert figures["batch_sizes"] == {"median": None, "max": None}
    orjson.dumps(figures)


@pytest.mark.parametrize(("count", "p99"), [(1, 1), (50, 50), (100, 99), (101, 100), (200, 198)])
def test_the_99th_percentile_is_the_smallest_value_that_99_percent_do_not_exceed(count: int, p99: int) -> None:
    assert spread(range(1, count + 1))["p99"] == p99
