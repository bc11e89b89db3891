"""The parent's side of a probe: starts it, gives it batches, watches its memory, and starts it again when it has died.

A probe that grows beyond the budget is ended at once, before the machine suffers. Memory has run out too where the
backend says so, where the kernel ends the process, and where native code gives up near a limit: it cannot raise.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Self

import orjson
import psutil

from streamproc.errors import BackendError

WATCH_S = 0.01
NEAR_THE_LIMIT = 0.8
"""Of the budget: native code that aborts from here on is taken to have run out of memory."""
RUNS = 7

Record = dict[str, Any]


class End(Enum):
    """Why a batch has no figures."""

    MEMORY = "memory"
    TIME = "time"


@dataclass(frozen=True, slots=True)
class Ran:
    """What batches of a shape took; ``failed`` records of the first failed by themselves."""

    times_ms: Sequence[float]
    peak_bytes: int
    failed: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a probe says once the backend is loaded."""

    seconds: float
    memory: str
    """``host`` or ``cuda``."""
    idle_bytes: int
    ceiling: tuple[int, str] | None
    """The most memory it can hold, and what says so."""
    libraries: dict[str, str]


class Prober:
    """Runs batches in a process that may die; a context manager, which the process does not outlive.

    Args:
        setup: For ``estimate.probe``.
        environ: The process's environment.
        backend: Its name, for errors.
        load_timeout_s: How long loading may take.
        batch_timeout_s: How long a batch may take, its repetitions included.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        setup: dict[str, Any],
        environ: Mapping[str, str],
        *,
        backend: str,
        load_timeout_s: float,
        batch_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setup = orjson.dumps(setup) + b"\n"
        self._environ = environ
        self._backend = backend
        self._load_timeout_s = load_timeout_s
        self._batch_timeout_s = batch_timeout_s
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""
        self._seen_bytes = 0
        self.budget_bytes: float | None = None
        """A probe that holds more of the host's memory is ended."""
        self._on_host = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(BrokenPipeError):  # what it had not read yet
                self._process.__exit__(None, None, None)
            self._process, self._read = None, b""

    def start(self) -> Loaded:
        """A fresh process, in which no batch has run but the warm-up.

        Raises:
            BackendError: the backend cannot be loaded.
        """
        self.stop()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "streamproc.estimate.probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environ,
            bufsize=0,
        )
        answer = self._ask(self._setup, self._load_timeout_s, watched=False)
        if answer is End.TIME:
            raise BackendError(
                f"the backend {self._backend} was not loaded within {self._load_timeout_s:g} s; raise "
                "pool.initialize_timeout_s, or see what initialize() waits for"
            )
        if answer is End.MEMORY:
            raise BackendError(f"the backend {self._backend} does not fit into memory")
        if answer["event"] != "loaded":
            raise BackendError(f"the backend {self._backend} cannot be loaded: {answer['message']}")
        self._on_host = answer["memory"] == "host"
        ceiling = answer["ceiling"]
        return Loaded(
            seconds=answer["seconds"],
            memory=answer["memory"],
            idle_bytes=answer["idle_bytes"],
            ceiling=None if ceiling is None else (ceiling[0], ceiling[1]),
            libraries=answer["libraries"],
        )

    def length_of(self, record: Record) -> int:
        """How long a record is, by the backend's ``length``.

        Raises:
            BackendError: the backend has none, or it failed.
        """
        if self._process is None:
            self.start()
        answer = self._ask(orjson.dumps({"length_of": record}) + b"\n", self._batch_timeout_s, watched=True)
        if isinstance(answer, End) or answer["event"] != "length":
            why = f"no {answer.value} was left" if isinstance(answer, End) else answer["message"]
            raise BackendError(f"length() of the backend {self._backend} failed: {why}")
        return int(answer["length"])

    def run(
        self, batches: Sequence[Sequence[Record]], *, seconds: float, runs: int = RUNS, fresh: bool = True
    ) -> Ran | End:
        """Run batches of one shape: the first to warm up, and all in turn for their times.

        There are ``runs`` runs that count, or as many as begin within so many seconds; one at least. With ``fresh`` the
        C library gives back what it keeps of the batches before.

        Raises:
            BackendError: the backend failed on one, and not for want of memory or time.
        """
        if self._process is None:
            self.start()
        distinct: dict[int, Record] = {id(record): record for batch in batches for record in batch}
        numbers = {key: number for number, key in enumerate(distinct)}
        request = {
            "records": list(distinct.values()),
            "batches": [[numbers[id(record)] for record in batch] for batch in batches],
            "runs": runs,
            "seconds": seconds,
            "fresh": fresh,
        }
        answer = self._ask(orjson.dumps(request) + b"\n", self._batch_timeout_s, watched=True)
        if isinstance(answer, End):
            self.stop()
            return answer
        if answer["event"] == "out_of_memory":
            self.stop()
            return End.MEMORY
        if answer["event"] == "failed":
            raise BackendError(f"a batch of {len(batches[0])} sample records failed: {answer['message']}")
        return Ran(answer["times_ms"], answer["peak_bytes"], answer["failed"])

    def _ask(self, line: bytes, limit_s: float, *, watched: bool) -> dict[str, Any] | End:
        """The answer to a line, or why there is none. Raises BackendError."""
        process = self._process
        assert process is not None  # noqa: S101 - whoever asks has started it
        assert process.stdin is not None  # noqa: S101 - it was asked for
        assert process.stdout is not None  # noqa: S101 - as above
        self._seen_bytes = 0
        with contextlib.suppress(BrokenPipeError):  # its end is found below
            process.stdin.write(line)
        deadline = self._clock() + limit_s
        while b"\n" not in self._read:
            if select.select([process.stdout], [], [], WATCH_S)[0]:
                data = os.read(process.stdout.fileno(), 65_536)
                if not data:
                    return self._ended(process.wait())
                self._read += data
            elif watched and self._on_host and self._is_beyond(process.pid):
                return End.MEMORY
            elif self._clock() > deadline:
                return End.TIME
        answered, _, self._read = self._read.partition(b"\n")
        answer: dict[str, Any] = orjson.loads(answered)
        return answer

    def _is_beyond(self, pid: int) -> bool:
        with contextlib.suppress(psutil.Error):
            self._seen_bytes = psutil.Process(pid).memory_info().rss
        return self.budget_bytes is not None and self._seen_bytes > self.budget_bytes

    def _ended(self, code: int) -> End:
        """Why the process has ended by itself."""
        near = self.budget_bytes is not None and self._seen_bytes > NEAR_THE_LIMIT * self.budget_bytes
        if code == -signal.SIGKILL or (near and code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)):
            return End.MEMORY
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise BackendError(f"the backend {self._backend}: its process {how} while it was measured")
