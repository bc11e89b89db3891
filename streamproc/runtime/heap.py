"""The C library's heap, tuned for a process that takes and frees megabytes with every batch."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_KEPT_BYTES = 33_554_432
"""How much freed memory at the heap's end stays with the process: some batches with all that is made of them."""
_LARGEST_BYTES = 33_554_432
"""A block from this size is mapped by itself; glibc allows no more, and comes to it by itself where such are freed."""
_STEP_BYTES = 1_048_576
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Have glibc keep what a batch frees for the next one; for a process of its own, as it concerns all of it.

    By default it hands the end of its heap back to the kernel as soon as 128 KiB of it are free, and large buffers at
    once; the next batch has it faulted in again page by page, each cleared. In a worker that was half of what decoding
    and encoding small records took, in the parent a seventh of everything. Other C libraries are left as they are.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            mallopt = ctypes.CDLL(None).mallopt
            # Setting one of them ends glibc's own adjustment of all.
            mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
            mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
            mallopt(_M_TOP_PAD, _STEP_BYTES)
