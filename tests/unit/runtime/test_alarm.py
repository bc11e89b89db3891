"""The alarm rings once, at its time or after; by the kernel's timers, and by the event loop's where there are none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from streamproc.runtime import alarm
from streamproc.runtime.alarm import Alarm

EARLY_S = alarm.LOOP_TIMER_S
"""The loop counts from a time that it has cut to milliseconds."""
DEADLINE_S = 10.0

Rung = asyncio.Queue[float]


@pytest.fixture(params=["linux", "darwin"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarm, "sys", SimpleNamespace(platform=request.param))


def with_alarm(test: Callable[[Alarm, Rung], Awaitable[None]]) -> None:
    async def main() -> None:
        rung: Rung = asyncio.Queue()
        it = Alarm(lambda: rung.put_nowait(time.monotonic()), time.monotonic)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await test(it, rung)
        finally:
            it.close()

    asyncio.run(main())


@pytest.mark.usefixtures("platform")
def test_it_rings_at_its_time_and_may_be_set_again() -> None:
    async def test(it: Alarm, rung: Rung) -> None:
        for wait_s in (0.0, 0.0004, 0.003, 0.01, -1.0):
            at = time.monotonic() + wait_s
            it.set(at)
            assert await rung.get() >= at - EARLY_S
        assert rung.empty()

    with_alarm(test)


@pytest.mark.usefixtures("platform")
def test_what_is_set_later_takes_the_place_of_what_was_set_before() -> None:
    async def test(it: Alarm, rung: Rung) -> None:
        begun = time.monotonic()
        it.set(begun + 0.002)
        it.set(begun + 3_600)
        it.set(begun + 0.02)
        assert await rung.get() >= begun + 0.02 - EARLY_S
        assert rung.empty()

    with_alarm(test)


@pytest.mark.usefixtures("platform")
def test_set_to_none_or_closed_it_does_not_ring() -> None:
    async def test(it: Alarm, rung: Rung) -> None:
        other = asyncio.Event()
        after = Alarm(other.set, time.monotonic)
        for closes in (False, True):
            it.set(time.monotonic() + 0.001)
            if closes:
                it.close()
            else:
                it.set(None)
            assert it.at is None
            other.clear()
            after.set(time.monotonic() + 0.01)
            await other.wait()
            assert rung.empty()
        after.close()

    with_alarm(test)


def test_a_ring_that_is_taken_back_before_the_loop_looks_is_none() -> None:
    """The kernel's timer is due, and then set anew: what the loop was told of it is out of date."""

    async def test(it: Alarm, rung: Rung) -> None:
        at = time.monotonic() + 0.02
        it.set(time.monotonic())
        while time.monotonic() < at - 0.015:
            pass
        it.set(at)
        assert await rung.get() >= at - EARLY_S

    with_alarm(test)
