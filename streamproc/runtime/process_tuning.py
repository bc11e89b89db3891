"""Python's search for cycles and the C library's memory, tuned for a process that makes records by the ten thousand.

Both are settings of the whole process, so only what is a process of its own calls this: a library must not.
"""

from __future__ import annotations

import ctypes
import gc

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MIB = 1 << 20
_KEPT_BYTES = 128 * _MIB
"""Free memory at the end of the heap beyond which it goes back to the system."""
_LARGE_BYTES = 32 * _MIB
"""The most that glibc takes from its heap; larger blocks come from the system, one by one."""
_STEP_BYTES = 16 * _MIB


def tune_for_records() -> None:
    """Tune the garbage collector and the C library of a process that is there for the data path.

    It makes records by the ten thousand and cycles hardly ever: looking for them as often as Python does by default
    took a seventh of the parent's time.

    Its buffers are of megabytes and live for milliseconds. glibc fetches each from the system, and gives it back, and
    the system clears each page in between: another seventh. So they come from the heap here, which keeps what is free.
    """
    gc.set_threshold(100_000, 20, 20)
    # Other C libraries have no such function, or take no notice.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TOP_PAD, _STEP_BYTES)
