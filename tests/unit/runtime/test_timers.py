"""The timer of the next deadline: whole milliseconds, as the event loop has them, and what is nearer is due."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from streamproc.runtime.processor import EARLY_S, TIMER_S, timer_delay_s

SLACK_S = 1e-6


@given(
    wait_s=st.floats(0.0, 0.2),
    begun_s=st.floats(0.0, 1.0),
    cuts=st.booleans(),
)
def test_a_window_closes_within_half_a_millisecond_and_nothing_spins(wait_s: float, begun_s: float, cuts: bool) -> None:
    """The loop calls at the time that it was told; or, as libuv, from a time that it has cut to milliseconds."""
    now, due, timers = begun_s, begun_s + wait_s, 0
    while now + EARLY_S < due:
        delay_s = timer_delay_s(due - now)
        milliseconds = delay_s / TIMER_S
        assert milliseconds >= 1
        assert math.isclose(milliseconds, round(milliseconds))
        since = math.floor(now / TIMER_S) * TIMER_S if cuts else now
        now = max(since + delay_s, now + 1e-5)
        timers += 1
    assert timers <= 3
    assert -EARLY_S - SLACK_S <= now - due <= EARLY_S + SLACK_S or wait_s <= EARLY_S
