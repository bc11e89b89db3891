"""When records are due, and how the deviation from that is measured."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.replay.pace import Deviation, FixedRate, OriginalPace, Unpaced


def test_the_original_pace_is_that_of_the_timestamps() -> None:
    pace = OriginalPace()
    assert [pace.due(ms) for ms in (5_000, 5_000, 5_250, 7_000)] == [0.0, 0.0, 0.25, 2.0]


def test_a_speed_divides_the_time() -> None:
    pace = OriginalPace(10)
    assert [pace.due(ms) for ms in (0, 1_000, 60_000)] == [0.0, 0.1, 6.0]


def test_a_record_that_is_older_than_the_one_before_is_due_with_it() -> None:
    pace = OriginalPace()
    assert [pace.due(ms) for ms in (1_000, 3_000, 500, 2_000, 3_500)] == [0.0, 2.0, 2.0, 2.0, 2.5]


def test_a_fixed_rate_asks_no_timestamps() -> None:
    pace = FixedRate(4)
    assert [pace.due(ms) for ms in (9, 0, 7, 7, 7)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_as_fast_as_possible_everything_is_due_at_once() -> None:
    assert {Unpaced().due(ms) for ms in (1, 2, 3)} == {0.0}


@given(st.lists(st.integers(-1, 2**44)), st.floats(0.001, 1_000))
def test_dues_never_go_back_and_begin_at_the_start(timestamps: list[int], speed: float) -> None:
    pace = OriginalPace(speed)
    dues = [pace.due(ms) for ms in timestamps]
    assert dues == sorted(dues)
    assert dues[:1] == [0.0][: len(dues)]
    # The clock is that of the timestamps, over the speed, wherever they have reached a new height.
    for due, ms in zip(dues, timestamps, strict=True):
        expected = (ms - timestamps[0]) / 1_000 / speed
        assert due >= expected - 1e-6 - 1e-12 * abs(expected)


def test_records_on_time_do_not_deviate() -> None:
    deviation = Deviation()
    before = deviation.observe([0.0], None, 0.0)
    before = deviation.observe([0.1], before, 0.1)
    deviation.observe([0.2], before, 0.2)
    assert deviation.between_ms(1.0) == pytest.approx(0, abs=0.001)
    assert deviation.late_ms(1.0) == 0


def test_what_comes_together_deviates_by_the_time_that_should_be_between() -> None:
    deviation = Deviation()
    before = deviation.observe([0.0], None, 0.001)
    deviation.observe([0.010, 0.014], before, 0.014)
    assert deviation.between_ms(1 / 3) == 0
    assert deviation.between_ms(2 / 3) == pytest.approx(3, rel=1 / 32)  # 13 ms apart, where 10 were due
    assert deviation.between_ms(1.0) == pytest.approx(4, rel=1 / 32)
    assert deviation.late_ms(1.0) == pytest.approx(4, rel=1 / 32)


def test_without_records_there_is_no_quantile() -> None:
    assert Deviation().between_ms(0.5) is None


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_not_below_and_hardly_above_the_true_one(lates: list[float], share: float) -> None:
    deviation = Deviation()
    for late in lates:
        deviation.observe([0.0], None, late)
    true_ms = sorted(lates)[math.ceil(share * len(lates)) - 1] * 1_000
    found = deviation.late_ms(share)
    assert found is not None
    assert true_ms - 0.001 <= found <= true_ms * (1 + 1 / 32) + 0.001
