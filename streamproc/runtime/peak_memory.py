"""How much memory a process holds, and the most that it held: of the host, or of a CUDA device.

The kernel keeps the peak of a process's resident memory (VmHWM) and sets it back when told to (``clear_refs``), so that
each batch has a peak of its own; to do both takes 4 µs. Where it does not, the peak is the highest since the start:
right as long as batches come in the order of their memory, as those of a probe do, and else right when it is a new one.
Of a device the framework knows: torch counts what its allocator holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
from pathlib import Path
from typing import Any, Literal, Protocol

_SELF = Path("/proc/self")
_RESET_PEAK = b"5"
_STATUS_BYTES = 16_384
"""More than /proc/self/status ever has."""


class Peak(Protocol):
    """Measures a peak."""

    kind: Literal["host", "cuda"]

    def reset(self) -> bool:
        """From here on; whether that can be done. If not, ``read`` is of all since the start."""

    def read(self) -> int:
        """The most bytes since then."""

    def now(self) -> int:
        """The bytes that are held now."""

    def ceiling(self) -> tuple[int, str] | None:
        """The most that this process can hold, and what says so; None where nothing does."""


class HostPeak:
    """This process's resident memory. Keeps two files open: to open them takes longer than what they are read for."""

    kind: Literal["host", "cuda"] = "host"

    def __init__(self) -> None:
        self._status = _opened("status", os.O_RDONLY)
        self._clear_refs = _opened("clear_refs", os.O_WRONLY)

    def reset(self) -> bool:
        """As ``Peak``. macOS cannot, nor a container that hides the file."""
        if self._clear_refs is None:
            return False
        try:
            os.pwrite(self._clear_refs, _RESET_PEAK, 0)
        except OSError:
            return False
        return True

    def read(self) -> int:
        """As ``Peak``."""
        found = _bytes_of(b"VmHWM", self._status)
        if found is not None:
            return found
        unit = 1 if sys.platform == "darwin" else 1_024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def now(self) -> int:
        """As ``Peak``."""
        import psutil  # noqa: PLC0415 - a worker does without

        return psutil.Process().memory_info().rss

    def ceiling(self) -> tuple[int, str] | None:
        """As ``Peak``: by the resource limits. They count what is reserved, so what is not resident of it is less."""
        import psutil  # noqa: PLC0415 - as above

        known = psutil.Process().memory_info()
        found = []
        for name, limit, counted in (
            ("RLIMIT_AS", resource.RLIMIT_AS, known.vms),
            ("RLIMIT_DATA", resource.RLIMIT_DATA, _bytes_of(b"VmData", self._status)),
        ):
            soft = resource.getrlimit(limit)[0]
            if soft != resource.RLIM_INFINITY and counted is not None:
                found.append((known.rss + max(soft - counted, 0), name))
        return min(found, default=None)


class CudaPeak:
    """What torch's allocator holds of its current device."""

    kind: Literal["host", "cuda"] = "cuda"

    def __init__(self, torch: Any) -> None:
        self._cuda = torch.cuda

    def reset(self) -> bool:
        """As ``Peak``."""
        self._cuda.reset_peak_memory_stats()
        return True

    def read(self) -> int:
        """As ``Peak``."""
        return int(self._cuda.max_memory_reserved())

    def now(self) -> int:
        """As ``Peak``."""
        return int(self._cuda.memory_reserved())

    def ceiling(self) -> tuple[int, str] | None:
        """As ``Peak``: what is free on the device, and what is held already."""
        free, _ = self._cuda.mem_get_info()
        return int(free) + self.now(), "the device"


def release_memory() -> None:
    """Have the C library give back what it keeps of memory that was freed, where it is one that can (glibc)."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_of_backend() -> Peak:
    """The peak to go by, once the backend is loaded: the device's where torch holds memory on one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.memory_reserved() > 0:
        return CudaPeak(torch)
    return HostPeak()


def _opened(name: str, mode: int) -> int | None:
    """The descriptor of a file of this process's in /proc; None where there is none."""
    try:
        return os.open(_SELF / name, mode | os.O_CLOEXEC)
    except OSError:
        return None


def _bytes_of(field: bytes, status: int | None) -> int | None:
    """A field of /proc/self/status, which has kilobytes."""
    if status is None:
        return None
    content = os.pread(status, _STATUS_BYTES, 0)
    at = content.find(b"\n" + field + b":")
    return None if at < 0 else int(content[at + len(field) + 2 :].split(None, 1)[0]) * 1_024
