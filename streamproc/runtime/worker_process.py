"""A child's process as its supervisor holds it: its start, its socket, its shared memory and its end.

Nothing here blocks or decides anything. Frames come through ``on_frame`` in the worker's order; where something else
came, ``on_garbage`` is called once, and no frame after it; ``on_closed`` is called once, at the end.

Invariant: whatever way it ends, ``close`` leaves nothing behind: no descriptor, no memory, and no process that the
backend has started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from streamproc.runtime.wire import BATCHES_PER_WORKER, MAX_CHUNK_RECORDS, Frame, FrameReceiver, Segment
from streamproc.settings import SECRET_VARIABLES, PoolSettings

SOCKET_BUFFER_BYTES = 1_048_576
LAST_FRAMES_S = 1.0
_ROOT = str(Path(__file__).resolve().parents[2])
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


def worker_environment(settings: PoolSettings, index: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the worker with this index: threads, devices, and what ``pool.env`` says, over ``environ``.

    The secrets of our own settings are left out: no worker logs in at Kafka, and a backend prints all kinds of things.
    """
    threads = settings.threads_per_worker or max(1, (os.cpu_count() or 1) // settings.workers)
    inherited = {name: value for name, value in environ.items() if name.upper() not in SECRET_VARIABLES}
    environment = {**inherited, "STREAMPROC_WORKER": str(index)}
    for variable in _THREAD_VARIABLES:
        if settings.threads_per_worker is not None or variable not in environment:
            environment[variable] = str(threads)
    if settings.devices:
        environment["CUDA_VISIBLE_DEVICES"] = settings.devices[index % len(settings.devices)]
    return {**environment, **settings.env}


def measurer_environment(settings: PoolSettings, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the measuring process: a worker's, but one thread, and no device to load weights to."""
    environment = {**worker_environment(settings, 0, environ), **dict.fromkeys(_THREAD_VARIABLES, "1")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    del environment["STREAMPROC_WORKER"]
    return {**environment, **settings.env}


class ChildProcess:
    """A running child; ``segments`` is the memory that is shared with it."""

    def __init__(
        self,
        on_frame: Callable[[Frame], None],
        on_garbage: Callable[[str], None],
        on_closed: Callable[[], None],
        *,
        max_body_bytes: int,
    ) -> None:
        """For ``launch``."""
        self.segments: list[Segment] = []
        self._receiver = FrameReceiver(on_frame, on_garbage, self._disconnected, max_body_bytes=max_body_bytes)
        self._on_closed = on_closed
        self._closed = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.Transport | None = None

    async def _launch(self, program: str, environment: dict[str, str], *, segments: int = 0) -> None:
        """Start the module of this name, ``runtime``'s, with so many segments. Raises OSError."""
        try:
            await self._start(program, environment, segments)
        except BaseException:
            if self._process is not None:
                self.kill()
            self._release()
            raise

    async def _start(self, program: str, environment: dict[str, str], segments: int) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        ours.setblocking(False)
        with theirs:
            try:
                for _ in range(segments):
                    self.segments.append(Segment.create())
                descriptors = [theirs.fileno(), *(segment.fd for segment in self.segments)]
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-c",
                    _boot(program),
                    str(descriptors[0]),
                    str(os.getpid()),
                    *map(str, descriptors[1:]),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else None,
                    pass_fds=descriptors,
                    env=environment,
                    # Ctrl-C in the terminal must not reach it before it can ignore it.
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self._transport, _ = await asyncio.get_running_loop().create_unix_connection(lambda: self._receiver, sock=ours)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._running.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, as ``wait`` says it; None while it runs."""
        return self._running.returncode

    def write(self, frame: bytes) -> None:
        """Send a frame; what the socket does not take at once is kept and sent later."""
        if self._transport is not None:
            self._transport.write(frame)

    def resident_bytes(self) -> int | None:
        """Its resident memory, shared segments included, what it forked not; None once it has ended."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return None

    def kill(self) -> bool:
        """End it and all that it started, at once; False where it has ended already."""
        if self.returncode is not None:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        return True

    async def wait(self) -> int:
        """Until it has ended; its exit code, negative for a signal. Frames may still come."""
        return await self._running.wait()

    async def close(self) -> None:
        """After its end: take what it still wrote, and release everything."""
        # What the backend started (loaders of data, say) is in the worker's group, and of no use without it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        # A reply written just before the end is still in the socket; a grandchild may hold the socket open.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_FRAMES_S):
                await self._closed.wait()
        self._release()

    def _release(self) -> None:
        if self._transport is not None:
            self._transport.close()
        for segment in self.segments:
            segment.close()

    def _disconnected(self) -> None:
        self._closed.set()
        self._on_closed()

    @property
    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise AssertionError("the child has not been started")
        return self._process


class WorkerProcess(ChildProcess):
    """A running worker; of its segments two lead to it and two from it."""

    def __init__(
        self,
        settings: PoolSettings,
        on_frame: Callable[[Frame], None],
        on_garbage: Callable[[str], None],
        on_closed: Callable[[], None],
    ) -> None:
        """For ``launch``."""
        super().__init__(on_frame, on_garbage, on_closed, max_body_bytes=settings.shared_memory_threshold_bytes)

    @classmethod
    async def launch(
        cls,
        settings: PoolSettings,
        index: int,
        on_frame: Callable[[Frame], None],
        on_garbage: Callable[[str], None],
        on_closed: Callable[[], None],
    ) -> WorkerProcess:
        """Start the worker with this index. Raises OSError."""
        worker = cls(settings, on_frame, on_garbage, on_closed)
        environment = worker_environment(settings, index, os.environ)
        await worker._launch("worker", environment, segments=2 * BATCHES_PER_WORKER)
        return worker


class MeasurerProcess(ChildProcess):
    """A running measuring process."""

    @classmethod
    async def launch(
        cls,
        settings: PoolSettings,
        on_frame: Callable[[Frame], None],
        on_garbage: Callable[[str], None],
        on_closed: Callable[[], None],
    ) -> MeasurerProcess:
        """Start it. Raises OSError."""
        measurer = cls(on_frame, on_garbage, on_closed, max_body_bytes=8 * MAX_CHUNK_RECORDS)
        await measurer._launch("measurer", measurer_environment(settings, os.environ))
        return measurer


def describe_exit(code: int | None) -> str:
    """How a child ended, by its exit code as ``wait`` says it; None where there was no child."""
    if code is None:
        return "it could not be started"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"
    return f"it exited with code {code}"


def _boot(program: str) -> str:
    """The child's first line of Python."""
    path = f"{_ROOT!r} in sys.path or sys.path.append({_ROOT!r})"
    return f"import sys; {path}; from streamproc.runtime.{program} import main; main()"


def _has_descriptor(stream: Any) -> bool:
    try:
        return bool(stream.fileno() >= 0)
    except (AttributeError, NotImplementedError, OSError, ValueError):  # the second is that of Faust's, which is a log
        return False
