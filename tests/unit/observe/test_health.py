"""Progress-based liveness, and the models of the status."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.observe.health import Health, ProgressWatch
from streamproc.observe.status import EXAMPLE, LastBatch, ProcessorStatus, RecordCounts


def test_health_is_ok_without_reasons_and_only_then() -> None:
    assert Health.of() == Health(ok=True, reasons=[])
    assert Health.of("worker 0 is starting") == Health(ok=False, reasons=["worker 0 is starting"])


def test_nothing_observed_is_no_stall() -> None:
    assert ProgressWatch(1.0).stalled(1e9) is None


def test_lag_without_movement_is_a_stall_after_the_set_time() -> None:
    watch = ProgressWatch(30.0)
    watch.observe(lag=5, committed=100, now=0.0)
    watch.observe(lag=9, committed=100, now=20.0)
    assert watch.stalled(29.9) is None
    assert watch.stalled(30.0) == 30.0
    assert watch.stalled(45.0) == 45.0


def test_a_commit_starts_the_time_again() -> None:
    watch = ProgressWatch(30.0)
    watch.observe(lag=5, committed=100, now=0.0)
    watch.observe(lag=4, committed=101, now=29.0)
    assert watch.stalled(58.0) is None
    assert watch.stalled(59.0) == 30.0


def test_no_lag_is_never_a_stall_and_lag_after_idleness_starts_at_zero() -> None:
    watch = ProgressWatch(30.0)
    watch.observe(lag=0, committed=100, now=0.0)
    assert watch.stalled(1000.0) is None
    watch.observe(lag=1, committed=100, now=1000.0)
    assert watch.stalled(1029.0) is None
    assert watch.stalled(1030.0) == 30.0
    watch.observe(lag=0, committed=101, now=1031.0)
    assert watch.stalled(2000.0) is None


def test_a_batch_may_compute_for_as_long_as_the_watch_allows() -> None:
    batch_timeout_s = 300.0
    watch = ProgressWatch(batch_timeout_s)
    for second in range(0, 299, 10):
        watch.observe(lag=64, committed=0, now=float(second))
        assert watch.stalled(float(second)) is None


def test_a_watch_without_patience_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        ProgressWatch(0.0)


OBSERVATIONS = st.lists(
    st.tuples(
        st.floats(min_value=0, max_value=10, allow_nan=False),
        st.integers(min_value=0, max_value=2),
        st.integers(min_value=-1, max_value=2),
    ),
    max_size=20,
)


@given(
    observations=OBSERVATIONS, later=st.floats(min_value=0, max_value=20), after=st.floats(min_value=0.1, max_value=15)
)
def test_a_stall_is_the_age_of_the_last_run_of_equal_commits_with_lag(
    observations: list[tuple[float, int, int]], later: float, after: float
) -> None:
    watch = ProgressWatch(after)
    now = 0.0
    history: list[tuple[float, int, int]] = []
    for pause, lag, committed in observations:
        now += pause
        watch.observe(lag, committed, now)
        history.append((now, lag, committed))
    now += later

    since: float | None = None
    for at, lag, committed in reversed(history):
        if lag <= 0 or committed != history[-1][2]:
            break
        since = at
    expected = None if since is None or now - since < after else now - since
    assert watch.stalled(now) == expected


def test_a_status_survives_the_trip_through_json_with_all_its_fields() -> None:
    text = EXAMPLE.model_dump_json(by_alias=True)
    assert ProcessorStatus.model_validate_json(text) == EXAMPLE
    assert '"in":4224' in text
    assert '"out":4095' in text


def test_the_example_leaves_no_field_of_its_parts_at_null() -> None:
    task = EXAMPLE.tasks["text"]
    assert None not in task.partitions[0].model_dump().values()
    assert None not in EXAMPLE.workers[0].model_dump().values()
    assert isinstance(task.last_batch, LastBatch)
    assert isinstance(task.counts, RecordCounts)
