"""The metrics: the table's rules, what the bound objects count, and the histogram against prometheus-client's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import parser as prometheus
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics_parser

from streamproc.observe.histogram import HistogramFamily
from streamproc.observe.metric_table import LABEL_MEANINGS, TABLE, TIME_BUCKETS, WORKER_STATES
from streamproc.observe.metrics import MAX_FAILURE_KINDS, Metrics
from streamproc.records import Batch, Cause, Failure, Lease, Record, Span, TopicPartition

PARTITION = TopicPartition("in", 3)
PARSE_PROMETHEUS: Callable[[str], Iterable[Metric]] = prometheus.text_string_to_metric_families
PARSE_OPENMETRICS: Callable[[str], Iterable[Metric]] = openmetrics_parser.text_string_to_metric_families


@dataclass(frozen=True)
class StoredRecord:
    """A record as a client would give it."""

    topic: str = "in"
    partition: int = 3
    offset: int = 0
    timestamp: int = 0
    key: bytes | None = None
    value: bytes | None = b"{}"
    headers: list[tuple[str, bytes | None]] = field(default_factory=list)


def a_batch(*arrivals: tuple[float, int], opened_at: float, attempt: int = 1, closed_by: str = "size") -> Batch:
    lease = Lease(PARTITION, 1)
    spans = []
    first = 0
    for arrived_at, count in arrivals:
        records: list[Record] = [StoredRecord(offset=first + index) for index in range(count)]
        spans.append(Span(lease, first, records, [2] * count, arrived_at))
        first += count
    return Batch(1, "text", spans, opened_at, opened_at, closed_by, fill=0.5, attempt=attempt)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"streamproc_{name}", labels)


def test_every_row_of_the_table_is_a_metric_and_every_metric_is_a_row() -> None:
    metrics = Metrics()
    built = {
        (family.name, family.type, family.documentation)
        for family in metrics.registry.collect()
        if not family.name.startswith("process_")
    }
    assert built == {(spec.name.removesuffix("_total"), spec.kind, spec.help) for spec in TABLE}


def test_every_name_has_the_prefix_and_ends_in_its_unit_or_as_a_counter_does() -> None:
    for spec in TABLE:
        assert spec.name.startswith("streamproc_")
        if spec.kind == "counter":
            assert spec.name.endswith("_total")
        elif spec.unit:
            assert spec.name.endswith(f"_{spec.unit}")
        if spec.kind == "histogram":
            assert spec.buckets
        assert spec.help.endswith(".")


def test_every_label_is_explained_and_none_is_explained_that_no_metric_has() -> None:
    assert {label for spec in TABLE for label in spec.labels} == set(LABEL_MEANINGS)


def test_time_buckets_tell_one_millisecond_from_its_neighbours() -> None:
    around = [bound for bound in TIME_BUCKETS if 0.0005 <= bound <= 0.002]
    assert len(around) >= 6
    assert TIME_BUCKETS[0] == 0.0001
    assert TIME_BUCKETS[-1] >= 300


def test_two_processors_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.task("text").records_in.inc(64)
    assert value(one, "records_in_total", task="text") == 64
    assert value(other, "records_in_total", task="text") is None


def test_a_registry_that_has_the_metrics_already_is_refused() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    with pytest.raises(ValueError, match="Duplicated"):
        Metrics(registry)


def test_a_task_is_bound_once_and_its_series_exist_before_anything_happens() -> None:
    metrics = Metrics()
    task = metrics.task("text")
    assert metrics.task("text") is task
    assert value(metrics, "records_out_total", task="text") == 0
    assert value(metrics, "batches_closed_total", task="text", rule="backlog") == 0
    assert value(metrics, "step_seconds_count", task="text", step="transform_outputs") == 0
    assert value(metrics, "producer_errors_total", task="text", output="dead_letters") == 0


def test_a_dispatched_batch_counts_its_rule_its_size_and_the_wait_of_every_record() -> None:
    metrics = Metrics()
    metrics.task("text").batch_dispatched(a_batch((10.0, 3), (10.5, 1), opened_at=10.0, closed_by="wait"), now=11.0)
    assert value(metrics, "batches_closed_total", task="text", rule="wait") == 1
    assert value(metrics, "batch_size_records_sum", task="text") == 4
    assert value(metrics, "batch_fill_ratio_sum", task="text") == 0.5
    assert value(metrics, "batch_wait_seconds_sum", task="text") == 1.0
    assert value(metrics, "record_queue_seconds_count", task="text") == 4
    assert value(metrics, "record_queue_seconds_sum", task="text") == 3.5
    assert value(metrics, "records_retried_total", task="text") == 0


def test_a_retried_batch_counts_its_records_as_retried_and_no_second_wait() -> None:
    metrics = Metrics()
    metrics.task("text").batch_dispatched(a_batch((10.0, 3), opened_at=10.0, attempt=2, closed_by="split"), now=11.0)
    assert value(metrics, "records_retried_total", task="text") == 3
    assert value(metrics, "batches_closed_total", task="text", rule="split") == 1
    assert value(metrics, "record_queue_seconds_count", task="text") == 0
    assert value(metrics, "batch_wait_seconds_count", task="text") == 0


def test_step_times_come_in_milliseconds_and_are_served_in_seconds() -> None:
    metrics = Metrics()
    metrics.task("text").steps_ran({"preprocess": 0.1, "transform_inputs": None, "execute": 12.0})
    assert value(metrics, "step_seconds_sum", task="text", step="execute") == 0.012
    assert value(metrics, "step_seconds_bucket", task="text", step="execute", le="0.01") == 0
    assert value(metrics, "step_seconds_bucket", task="text", step="execute", le="0.015") == 1
    assert value(metrics, "step_seconds_count", task="text", step="transform_inputs") == 0
    assert value(metrics, "step_seconds_count", task="text", step="transform_outputs") == 0


def _raised(kind: str) -> Failure:
    return Failure(Cause.EXCEPTION, "execute", kind, "no")


def test_failed_records_count_by_cause_stage_and_kind() -> None:
    metrics = Metrics()
    broken = Failure(Cause.INVALID, "decode", "InvalidJSON", "no")
    metrics.task("text").dead(broken).inc(2)
    metrics.task("text").dead(broken).inc()
    metrics.task("text").dropped(_raised("ValueError")).inc()
    labels = {"task": "text", "cause": "exception", "stage": "execute"}
    assert value(metrics, "records_dead_total", task="text", cause="invalid", stage="decode", kind="InvalidJSON") == 3
    assert value(metrics, "records_dropped_total", **labels, kind="ValueError") == 1


def test_error_types_without_end_share_one_series_after_a_while() -> None:
    metrics = Metrics()
    labels = {"task": "text", "cause": "exception", "stage": "execute"}
    for number in range(MAX_FAILURE_KINDS + 10):
        metrics.task("text").dead(_raised(f"Error{number}")).inc()
    assert value(metrics, "records_dead_total", **labels, kind="other") == 10
    metrics.task("text").dead(_raised("Error0")).inc()
    assert value(metrics, "records_dead_total", **labels, kind="Error0") == 2


def test_the_series_of_a_partition_end_when_it_is_given_up() -> None:
    metrics = Metrics()
    task = metrics.task("text")
    labels = {"task": "text", "topic": "in", "partition": "3"}
    task.partition(PARTITION).lag_records.set(7)
    assert task.partition(PARTITION) is task.partition(PARTITION)
    assert value(metrics, "lag_records", **labels) == 7
    task.forget(PARTITION)
    task.forget(PARTITION)
    assert value(metrics, "lag_records", **labels) is None
    assert value(metrics, "committed_offset", **labels) is None
    task.partition(PARTITION).lag_records.set(1)
    assert value(metrics, "lag_records", **labels) == 1


def test_workers_are_counted_by_state_and_a_state_left_out_has_none() -> None:
    metrics = Metrics()
    metrics.set_workers({"ready": 1, "busy": 3})
    metrics.set_workers({"ready": 4})
    assert {state: value(metrics, "workers", state=state) for state in WORKER_STATES} == {
        **dict.fromkeys(WORKER_STATES, 0),
        "ready": 4,
    }
    metrics.worker_restarted("deadline")
    assert value(metrics, "worker_restarts_total", cause="deadline") == 1
    assert value(metrics, "worker_restarts_total", cause="killed") == 0


def test_the_memory_of_a_worker_is_forgotten_with_it() -> None:
    metrics = Metrics()
    metrics.set_worker_rss(0, 4096)
    assert value(metrics, "worker_rss_bytes", worker="0") == 4096
    metrics.forget_worker(0)
    assert value(metrics, "worker_rss_bytes", worker="0") is None


def test_the_version_is_a_label() -> None:
    assert value(Metrics(version="1.2.3"), "build_info", version="1.2.3") == 1


def test_both_formats_can_be_parsed_and_hold_the_same_values() -> None:
    metrics = Metrics()
    metrics.task("text").records_in.inc(5)
    metrics.task("text").batch_wall.observe(0.0011)
    plain, plain_type = metrics.exposition()
    openmetrics, openmetrics_type = metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert plain_type.startswith("text/plain")
    assert openmetrics_type.startswith("application/openmetrics-text")
    for parse, text in ((PARSE_PROMETHEUS, plain), (PARSE_OPENMETRICS, openmetrics)):
        samples = {
            (sample.name, sample.labels.get("le")): sample.value
            for family in parse(text.decode())
            for sample in family.samples
        }
        assert samples["streamproc_records_in_total", None] == 5
        assert samples["streamproc_batch_wall_seconds_bucket", "0.001"] == 0
        assert samples["streamproc_batch_wall_seconds_bucket", "0.0013"] == 1
        assert samples["streamproc_batch_wall_seconds_bucket", "+Inf"] == 1


@given(
    observations=st.lists(
        st.tuples(
            st.one_of(st.sampled_from(TIME_BUCKETS), st.floats(min_value=0, max_value=1e4)),
            st.integers(min_value=1, max_value=5),
        ),
        max_size=30,
    )
)
def test_a_weighted_observation_counts_as_that_many_of_prometheus_clients_own(
    observations: list[tuple[float, int]],
) -> None:
    registry, oracle = CollectorRegistry(), CollectorRegistry()
    family = HistogramFamily("h_seconds", "Help.", ("task",), unit="seconds", buckets=TIME_BUCKETS)
    registry.register(family)
    theirs = prometheus_client.Histogram("h_seconds", "Help.", ["task"], buckets=TIME_BUCKETS, registry=oracle)
    child = family.labels("text")
    theirs.labels("text")
    for seconds, count in observations:
        child.observe(seconds, count)
        for _ in range(count):
            theirs.labels("text").observe(seconds)
    expected = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in oracle.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in registry.collect()
        for sample in metric.samples
    }
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[key], expected[key], rel_tol=1e-9, abs_tol=1e-12) for key in expected)
    assert child.count == sum(count for _, count in observations)


def test_a_histogram_refuses_buckets_that_do_not_rise_and_label_values_of_another_number() -> None:
    with pytest.raises(ValueError, match="do not rise"):
        HistogramFamily("h", "Help.", (), unit="", buckets=(1.0, 1.0))
    with pytest.raises(ValueError, match="has the labels"):
        HistogramFamily("h", "Help.", ("task",), unit="", buckets=(1.0,)).labels("a", "b")
