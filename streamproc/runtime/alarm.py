"""Wakes an event loop at a moment, to the tenth of a millisecond: its own timers count whole milliseconds.

libuv and epoll round to them, so that a window of 2 ms would close after 2 to 3. Linux has timers that are files
(timerfd), and a loop waits for files anyway. Elsewhere the loop's own timer has to do, rounded up: what rounds to none
uvloop would call at once, over and over.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

LOOP_TIMER_S = 0.001
"""What the event loop's timers can tell apart."""
_CLOCK_MONOTONIC = 1
_SHORTEST_NS = 1
"""None at all would turn the timer off."""
_NS = 1_000_000_000


class _Spec(ctypes.Structure):
    """``struct itimerspec``: an interval, which is none here, and the time until the timer is due."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("delay_s", ctypes.c_long),
        ("delay_ns", ctypes.c_long),
    )


class Alarm:
    """One alarm of the running event loop; ``ring`` is called when it is due, and nothing is set any more then."""

    def __init__(self, ring: Callable[[], None], clock: Callable[[], float]) -> None:
        self._ring = ring
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._file: int | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._at: float | None = None

    @property
    def at(self) -> float | None:
        """When it will ring, in seconds of the clock; None for never."""
        return self._at

    def set(self, at: float | None) -> None:
        """Ring at this time, in seconds of the clock, and not at the one before; None is never."""
        if at == self._at:
            return
        self._at = at
        if self._libc is not None:
            self._set_file(at)
            return
        if self._handle is not None:
            self._handle.cancel()
        self._handle = None
        if at is not None:
            self._handle = self._loop.call_later(max(at - self._clock(), LOOP_TIMER_S), self._on_due)

    def close(self) -> None:
        """Never ring again."""
        self.set(None)
        if self._file is not None:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = None

    def _set_file(self, at: float | None) -> None:
        if self._file is None:
            if at is None:
                return
            self._file = self._checked(self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
            self._loop.add_reader(self._file, self._on_readable, self._file)
        delay_ns = 0 if at is None else max(int((at - self._clock()) * _NS), _SHORTEST_NS)
        spec = _Spec(0, 0, *divmod(delay_ns, _NS))
        self._checked(self._libc.timerfd_settime(self._file, 0, ctypes.byref(spec), None))

    @staticmethod
    def _checked(answer: int) -> int:
        if answer < 0:
            raise OSError("the kernel gives no timer: are there too many open files?")
        return answer

    def _on_readable(self, file: int) -> None:
        try:
            os.read(file, 8)
        except BlockingIOError:
            return  # it was set anew meanwhile
        self._on_due()

    def _on_due(self) -> None:
        self._at = None
        self._ring()
