"""The circuit against a model that keeps every record, and what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.records import BatchReport, Cause, Failure, Outcome, Status
from streamproc.runtime.circuit import BUCKETS, MAX_REASONS, Circuit
from streamproc.runtime.failures import encode_failure
from streamproc.settings import CircuitSettings
from tests.support.spans import batch, lease, span

LEASE = lease()
BROKEN = Failure(Cause.EXCEPTION, "execute", "ValueError", "the model is broken")


def outcome(statuses: bytes, failure: Failure = BROKEN, *, from_worker: bool = False) -> Outcome:
    of = span(LEASE, 0, len(statuses))
    bad: bytes | Failure = encode_failure(failure) if from_worker else failure
    values = [b"{}" if status == Status.RESULT else bad for status in statuses]
    return Outcome(of, statuses, values, BatchReport(batch([of]), worker=0, metrics=b"{}", attempts=1))


def circuit(**settings: Any) -> Circuit:
    return Circuit(CircuitSettings.model_validate(settings))


@dataclass
class Model:
    """Every record that was decided since the last closing, with its step of the window and whether it was bad."""

    settings: CircuitSettings
    records: list[tuple[int, bool]] = field(default_factory=list)
    is_open: bool = False

    def step(self, now: float) -> int:
        return math.floor(now * BUCKETS / self.settings.window_s)

    def window(self, now: float) -> list[bool]:
        return [bad for step, bad in self.records if step > self.step(now) - BUCKETS]

    def take(self, statuses: bytes, now: float) -> bool:
        if self.is_open:
            return False
        run_reached = False
        for status in statuses:
            self.records.append((self.step(now), status != Status.RESULT))
            limit = self.settings.max_run
            last = [bad for _, bad in self.records[-limit:]] if limit is not None else []
            run_reached |= limit is not None and len(last) == limit and all(last)
        window, limit_rate = self.window(now), self.settings.max_rate
        rate_reached = (
            any(statuses)
            and limit_rate is not None
            and len(window) >= self.settings.min_records
            and sum(window) >= limit_rate * len(window)
        )
        self.is_open = run_reached or rate_reached
        return self.is_open

    def close(self) -> None:
        self.is_open = False
        self.records.clear()


statuses = st.one_of(
    st.lists(st.sampled_from([*Status]), min_size=1, max_size=12).map(bytes),
    st.integers(1, 12).map(lambda count: bytes([Status.RESULT]) * count),
    st.integers(1, 12).map(lambda count: bytes([Status.FAILED]) * count),
)
# Times in quarters, so that a step's edge is met exactly; a window of 30 s has steps of 1 s.
steps = st.lists(
    st.one_of(st.tuples(st.integers(0, 60).map(lambda quarters: quarters / 4), statuses), st.just("close")),
    max_size=60,
)


@given(
    steps,
    st.one_of(st.none(), st.sampled_from([0.1, 0.5, 1.0])),
    st.one_of(st.none(), st.integers(1, 15)),
    st.integers(1, 30),
)
def test_it_opens_exactly_when_a_model_that_keeps_every_record_does(
    moves: list[Any], max_rate: float | None, max_run: int | None, min_records: int
) -> None:
    settings = CircuitSettings(max_rate=max_rate, max_run=max_run, min_records=min_records, window_s=30)
    real, model, now = Circuit(settings), Model(settings), 1_000.0
    for move in moves:
        if move == "close":
            real.close()
            model.close()
        else:
            waited, decided = move
            now += waited
            assert real.take(outcome(decided), now) == model.take(decided, now)
            assert len(real._buckets) <= BUCKETS
        assert real.is_open == model.is_open
        if not model.is_open:
            window = model.window(now)
            assert real.counts(now) == (sum(window), len(window))


@given(st.lists(st.tuples(st.floats(0, 40), statuses), max_size=40), st.floats(1, 100))
def test_the_window_holds_all_of_its_time_but_a_step_and_nothing_older(
    moves: list[tuple[float, bytes]], window_s: float
) -> None:
    of = circuit(max_rate=None, max_run=None, window_s=window_s)
    now, records = 1_000.0, []
    for waited, decided in moves:
        now += waited
        of.take(outcome(decided), now)
        records += [now] * len(decided)
        counted, slack = of.counts(now)[1], window_s * 1e-9
        assert counted >= sum(at > now - window_s * (1 - 1 / BUCKETS) + slack for at in records)
        assert counted <= sum(at > now - window_s - slack for at in records)


def test_a_share_of_bad_records_opens_it_once_enough_were_decided() -> None:
    of = circuit(max_rate=0.5, min_records=8, max_run=None, close_after_s=20)
    assert not of.take(outcome(b"\1\1\1\1\1\1\1"), 5.0)
    assert of.take(outcome(b"\0\0\0\0\0\0\1", Failure(Cause.INVALID, "schema", "SchemaViolation", "no text")), 6.0)
    assert of.is_open
    assert of.openings == 1
    assert (of.opened_at, of.closes_at) == (6.0, 26.0)
    assert of.counts(10_000.0) == (8, 14)
    assert of.reason == (
        "8 of the last 14 records failed, most often with execute ValueError; the last: schema SchemaViolation: no text"
    )


def test_deliberate_drops_are_as_bad_as_dead_letters_and_workers_write_failures_as_text() -> None:
    of = circuit(max_rate=None, max_run=3)
    assert not of.take(outcome(b"\2\0\1"), 0.0)
    assert of.take(outcome(b"\2\1\0", from_worker=True), 0.0)
    assert of.reason.startswith("3 records in a row failed, most often with execute ValueError; the last: execute Val")


def test_a_run_within_one_span_counts_though_good_records_follow_it() -> None:
    assert circuit(max_rate=None, max_run=3).take(outcome(b"\0\1\2\1\0"), 0.0)
    assert not circuit(max_rate=None, max_run=3).take(outcome(b"\0\1\1\0\1\1\0\1\1"), 0.0)


def test_an_open_circuit_counts_nothing_and_begins_at_zero_when_it_closes() -> None:
    of = circuit(max_rate=None, max_run=4, close_after_s=10)
    assert of.take(outcome(b"\1\1\1\1"), 0.0)
    assert not of.take(outcome(b"\1\1\1\1"), 1.0), "it is open already"
    assert not of.due(9.9)
    assert of.due(10.0)
    of.close()
    assert not of.due(1e9)
    assert of.counts(10.0) == (0, 0)
    assert not of.take(outcome(b"\1\1\1"), 10.0)
    assert of.take(outcome(b"\1"), 10.0)
    assert of.openings == 2


def test_without_a_time_it_closes_by_command_only() -> None:
    of = circuit(max_rate=None, max_run=1, close_after_s=None)
    assert of.take(outcome(b"\1"), 0.0)
    assert not of.due(1e12)


def test_one_that_is_off_opens_by_hand_only() -> None:
    of = circuit(enabled=False, max_run=1)
    assert not of.take(outcome(b"\1" * 10_000), 0.0)
    assert not of.turned_bad(BROKEN, 0.0)
    of.open_by_hand(3.0)
    assert of.is_open
    assert (of.reason, of.closes_at) == ("opened by hand", None)


def test_opening_by_hand_what_is_open_keeps_it_open_and_says_so_once() -> None:
    of = circuit(max_rate=None, max_run=1, close_after_s=10)
    of.take(outcome(b"\1"), 0.0)
    for _ in range(2):
        of.open_by_hand(5.0)
    assert (of.opened_at, of.closes_at, of.openings) == (0.0, None, 1)
    assert of.reason.endswith("the model is broken; kept open by hand")


def test_results_that_turn_bad_later_move_from_the_good_to_the_bad() -> None:
    of = circuit(max_rate=0.5, min_records=10, max_run=1)
    of.take(outcome(bytes(10)), 0.0)
    too_large = Failure(Cause.TOO_LARGE, "sink", "ResultTooLarge", "it does not fit")
    for _ in range(4):
        assert not of.turned_bad(too_large, 1.0)
    assert of.counts(1.0) == (4, 10)
    assert of.turned_bad(too_large, 1.0)
    assert of.reason.startswith("5 of the last 10 records failed, most often with sink ResultTooLarge")


def test_what_turns_bad_when_its_window_has_passed_is_no_share_above_all() -> None:
    of = circuit(max_rate=0.5, min_records=1, max_run=None, window_s=10)
    of.take(outcome(b"\0"), 0.0)
    assert not of.turned_bad(BROKEN, 100.0)
    assert of.counts(100.0) == (0, 0)


def test_reasons_are_bounded_whatever_a_backend_calls_them() -> None:
    of = circuit(max_rate=None, max_run=None)
    for number in range(1_000):
        of.take(outcome(b"\1", Failure(Cause.EXCEPTION, "execute", f"Error{number}", "")), 0.0)
    assert len(of._buckets[0].reasons) == MAX_REASONS


def test_the_defaults_let_a_tenth_of_bad_records_pass_and_stop_a_broken_model() -> None:
    of = circuit()
    for _ in range(1_000):
        assert not of.take(outcome(b"\0" * 10 + b"\1"), 0.0)
    of = circuit()
    taken = next(index for index in range(100) if of.take(outcome(b"\1" * 64), index / 100))
    assert taken == 7, "after 512 records"


@pytest.mark.parametrize("max_run", [1, 64, 1_000])
def test_a_slow_stream_is_stopped_by_its_run(max_run: int) -> None:
    of = circuit(max_run=max_run)
    opened = [of.take(outcome(b"\1"), index * 10.0) for index in range(max_run)]
    assert opened == [False] * (max_run - 1) + [True]
