"""Supervises the measuring process: gives it records, brings back their lengths, times it and replaces it.

    add ─► waiting ─ send ─► measuring process ─► on_measured, on_unmeasured
               ▲                    │
               └────────────────────┘ dies, or measures past its deadline and is killed

Nothing here blocks or polls; everything happens in the event loop. Only bytes travel. Records wait in chunks: at most
one is measured and one queued in the process, and what came meanwhile goes with the next, so that chunks grow with the
load. A process that ended is started again; ``start_attempts`` failures to start in a row stop the processor.

A chunk that was only queued in a process that died goes again as it is. So does one that was being measured, the first
time: somebody may have killed the process. At the second death, or where the process ran past its deadline, the chunk's
records are measured one by one. A record that stands alone is at fault at the second death of its own, or the second
time that it ran past the deadline; it fails alone.

For a reload another process is made ready beside this one (``prepare``), and takes over (``switch``): what the one
before has not answered goes again to the new one.

Order: a task's records come back in the order in which they were added.

Invariants: every record that was added comes out exactly once, by ``on_measured``, ``on_unmeasured`` or ``discard``,
unless the measuring was stopped; what was discarded is in no answer. The process is not trusted: what is not exactly an
answer to the chunk that it measures is garbage, and garbage is a death.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from streamproc.errors import InternalError, ReloadRefusedError, StreamprocError, WorkerStartError
from streamproc.observe.metric_table import RestartCause
from streamproc.records import Cause, Failure, Lease, Span
from streamproc.runtime.wire import (
    MAX_CHUNK_RECORDS,
    UNMEASURED,
    Frame,
    Kind,
    WireError,
    decode_lengths,
    encode_frame,
    values_parts,
)
from streamproc.runtime.worker_process import ChildProcess, MeasurerProcess, describe_exit
from streamproc.settings import PoolSettings

CHUNKS_IN_PROCESS = 2
MAX_CHUNK_BYTES = 1_048_576
"""Beyond it a chunk takes no more records; a larger record goes alone."""
DEATHS_UNTIL_AT_FAULT = 2
MAX_RESTART_BACKOFF_S = 30.0
EXIT_GRACE_S = 5.0
DISCONNECT_GRACE_S = 0.5
STOPPED_FOR_S = 1.0
"""A timer that comes this late means that this whole process stood still, and perhaps the other with it."""

Launch = Callable[
    [PoolSettings, Callable[[Frame], None], Callable[[str], None], Callable[[], None]], Awaitable[ChildProcess]
]
"""Starts the process: the settings, what to call with each frame, with what was wrong where something else came, and at
the end."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class MeasuringEvents:
    """What the measuring tells its owner. ``on_room`` says that ``send`` may have something to do."""

    on_measured: Callable[[str, list[Span]], None]
    on_unmeasured: Callable[[str, list[tuple[Span, list[Failure]]]], None]
    on_room: Callable[[], None]
    on_restart: Callable[[RestartCause], None]
    on_fatal: Callable[[StreamprocError], None]


@dataclass(slots=True, eq=False)
class Chunk:
    """Records of one task that are measured together; None in the place of a span that was discarded meanwhile."""

    task: str
    spans: list[Span | None]
    counts: list[int] = field(default_factory=list)
    """The records of each span, as they were sent."""
    id: int = 0
    deaths: int = 0
    late: int = 0
    """How often it ran past its deadline."""

    def left(self) -> list[Span]:
        """The spans that were not discarded."""
        return [span for span in self.spans if span is not None]


@dataclass(slots=True, eq=False)
class Measurer:
    """One measuring process and what it is doing; ``settings`` and ``setup`` are what it is started with."""

    settings: PoolSettings
    setup: dict[str, Any]
    state: str = "starting"
    pid: int = 0
    chunks: deque[Chunk] = field(default_factory=deque)
    answered: int = 0
    kill_reason: str | None = None
    kill_message: str = ""
    start_message: str = ""
    start_hopeless: bool = False
    process: ChildProcess | None = None
    overdue: Chunk | None = None
    """What it was measuring when its deadline had passed."""
    timer: asyncio.TimerHandle | None = None
    dismissed: bool = False
    """Whether nothing is to follow from its end."""
    taking_over: asyncio.Future[None] | None = None
    """Of one that is to take over: set once it is ready, or to why it is refused."""


class Measuring:
    """The measuring process of a processor, and the records that wait for their lengths."""

    def __init__(
        self,
        settings: PoolSettings,
        setup: dict[str, Any],
        events: MeasuringEvents,
        clock: Callable[[], float],
        *,
        launch: Launch = MeasurerProcess.launch,
    ) -> None:
        """``setup`` is what the process is told at its start, see ``startup.measurer_setup``."""
        self._events = events
        self._clock = clock
        self._launch = launch
        self._waiting: dict[str, deque[Span]] = {task: deque() for task in setup["tasks"]}
        self._again: list[Chunk] = []
        self._measurer = Measurer(settings, setup, state="ended")
        self._candidate: Measurer | None = None
        self._ids = 0
        self._failed_starts = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._wake = asyncio.Event()
        """Ends the pause before a restart when all stops."""
        self.restarts = 0
        """How often the process was replaced."""
        self.initialized = asyncio.Event()
        """Set once a process was ready."""

    # -- what the processor asks

    async def start(self) -> None:
        """Start the process; the event ``on_room`` says when it can measure."""
        self._spawn()

    async def prepare(self, settings: PoolSettings, setup: dict[str, Any]) -> None:
        """Start a process with these beside the present one, and wait until it is ready; then ``switch``.

        Raises:
            ReloadRefusedError: it did not become ready. Nothing has changed.
        """
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._candidate = Measurer(settings, setup, taking_over=ready)
        self._launched(self._candidate)
        try:
            await ready
        finally:
            if ready.cancelled():
                self.refuse("nobody waits for it any more")

    @property
    def prepared(self) -> bool:
        """Whether a process is ready to take over."""
        return self._candidate is not None and self._candidate.state == "ready"

    def switch(self) -> None:
        """The process that is ``prepared`` takes over; what the one before has not answered goes to it."""
        before, candidate = self._measurer, self._candidate
        if candidate is None:
            raise AssertionError("nothing is prepared")
        self._candidate = candidate.taking_over = None
        self._measurer = candidate
        self._failed_starts = 0
        self.initialized.set()
        self._again[:0] = [chunk for chunk in before.chunks if chunk.left()]
        before.chunks.clear()
        self._drop(before)
        self._events.on_room()

    def refuse(self, why: str) -> None:
        """End the process that was to take over, where there is one."""
        candidate, self._candidate = self._candidate, None
        if candidate is None:
            return
        self._drop(candidate)
        if candidate.taking_over is not None and not candidate.taking_over.done():
            candidate.taking_over.set_exception(ReloadRefusedError(why))

    def _drop(self, measurer: Measurer) -> None:
        measurer.dismissed = True
        self._cancel_timer(measurer)
        self._kill(measurer, "dismissed")

    @property
    def ready(self) -> bool:
        """Whether the process is there and takes records."""
        return self._measurer.state == "ready"

    @property
    def pid(self) -> int | None:
        """The process's id, where there is one."""
        return self._measurer.pid or None

    def add(self, task: str, span: Span) -> None:
        """Take records in; ``send`` has them measured."""
        self._waiting[task].append(span)

    def size(self, task: str) -> int:
        """Records of a task that wait or are being measured."""
        chunks = [*self._measurer.chunks, *self._again]
        spans = [span for chunk in chunks if chunk.task == task for span in chunk.left()]
        return sum([len(span.records) for span in (*spans, *self._waiting.get(task, ()))])

    def send(self, held: Collection[str] = ()) -> None:
        """Give the process as much as it takes, but nothing of the tasks that are held."""
        measurer = self._measurer
        while measurer.state == "ready" and len(measurer.chunks) < CHUNKS_IN_PROCESS:
            chunk = self._next(held)
            if chunk is None:
                return
            self._submit(measurer, chunk)

    def discard(self, task: str, leases: set[Lease] | None = None) -> list[Span]:
        """Give back the records of a task that have no length yet, of these leases or all of them."""

        def goes(span: Span | None) -> bool:
            return span is not None and (leases is None or span.lease in leases)

        gone: list[Span] = []
        for chunk in (*self._measurer.chunks, *self._again):
            if chunk.task == task:
                gone += [span for span in chunk.left() if goes(span)]
                chunk.spans = [None if goes(span) else span for span in chunk.spans]
        self._again = [chunk for chunk in self._again if chunk.left()]
        waiting = self._waiting[task]
        gone += [span for span in waiting if goes(span)]
        self._waiting[task] = deque(span for span in waiting if not goes(span))
        return gone

    async def stop(self) -> None:
        """End the process, kindly where it is idle, and wait for its end."""
        self._stopping = True
        self.refuse("the processor is stopping")
        self._wake.set()
        measurer = self._measurer
        self._cancel_timer(measurer)
        if measurer.process is not None and measurer.state == "ready" and not measurer.chunks:
            measurer.process.write(encode_frame(Kind.STOP, {}))
        else:
            self._kill(measurer, "stopped")
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=EXIT_GRACE_S)
            self._kill(measurer, "stopped")
            if pending:
                await asyncio.wait(pending, timeout=EXIT_GRACE_S)

    def kill(self) -> None:
        """End the process at once, without waiting."""
        self._stopping = True
        for measurer in (self._measurer, self._candidate):
            if measurer is not None:
                self._kill(measurer, "stopped")

    # -- chunks

    def _next(self, held: Collection[str]) -> Chunk | None:
        for at, chunk in enumerate(self._again):
            if chunk.task not in held:
                return self._again.pop(at)
        oldest: deque[Span] | None = None
        of = ""
        for task, waiting in self._waiting.items():
            if waiting and task not in held and (oldest is None or waiting[0].arrived_at < oldest[0].arrived_at):
                of, oldest = task, waiting
        return None if oldest is None else Chunk(of, _taken(oldest))

    def _submit(self, measurer: Measurer, chunk: Chunk) -> None:
        if measurer.process is None:
            raise AssertionError("submitted to no process")
        spans = chunk.left()
        self._ids += 1
        chunk.id, chunk.spans, chunk.counts = self._ids, [*spans], [len(span.records) for span in spans]
        parts, size = values_parts(spans)
        head = {"id": chunk.id, "task": chunk.task, "count": sum(chunk.counts)}
        measurer.process.write(encode_frame(Kind.MEASURE, head, parts, size))
        measurer.chunks.append(chunk)
        if len(measurer.chunks) == 1:
            self._allow(measurer, measurer.settings.batch_timeout_s, "deadline")

    def _on_lengths(self, measurer: Measurer, frame: Frame) -> None:
        # The chunk stays with the process until its answer is known to be one.
        lengths, reasons = _answer(measurer, frame)
        chunk = measurer.chunks.popleft()
        measurer.answered += 1
        self._cancel_timer(measurer)
        if measurer.chunks:
            self._allow(measurer, measurer.settings.batch_timeout_s, "deadline")
        if reasons:
            self._deliver_parts(chunk, lengths, reasons)
        else:
            start = 0
            for span, count in zip(chunk.spans, chunk.counts, strict=True):
                if span is not None:
                    span.lengths = lengths[start : start + count]
                start += count
            if measured := chunk.left():
                self._events.on_measured(chunk.task, measured)
        self._events.on_room()

    def _deliver_parts(self, chunk: Chunk, lengths: list[int], reasons: list[Failure]) -> None:
        """Some records have no length: the spans come apart into runs of those that have one, and of the others."""
        measured: list[Span] = []
        unmeasured: list[tuple[Span, list[Failure]]] = []
        start = 0
        remaining = iter(reasons)
        for span, count in zip(chunk.spans, chunk.counts, strict=True):
            own = lengths[start : start + count]
            start += count
            failures = [next(remaining) for length in own if length == UNMEASURED]
            if span is None:
                continue
            told = iter(failures)
            for first, stop in _runs(own):
                part = span.part(first, stop)
                if own[first] == UNMEASURED:
                    unmeasured.append((part, [next(told) for _ in range(first, stop)]))
                else:
                    part.lengths = own[first:stop]
                    measured.append(part)
        if measured:
            self._events.on_measured(chunk.task, measured)
        if unmeasured:
            self._events.on_unmeasured(chunk.task, unmeasured)

    def _fell(self, chunk: Chunk, measurer: Measurer, cause: str) -> tuple[list[Chunk], Failure | None]:
        """A process ended while it measured this chunk: what is to be measured again, or why that one record failed."""
        spans = chunk.left()
        was_late = chunk is measurer.overdue
        if was_late:
            chunk.late += 1
        else:
            chunk.deaths += 1
        if sum([len(span.records) for span in spans]) > 1:
            if was_late or chunk.deaths >= DEATHS_UNTIL_AT_FAULT:
                return [Chunk(chunk.task, [one], late=chunk.late) for span in spans for one in span.singles()], None
        elif spans and max(chunk.late, chunk.deaths) >= DEATHS_UNTIL_AT_FAULT:
            if was_late:
                seconds = measurer.settings.batch_timeout_s
                message = f"the record was measured for more than {seconds:g} s, and the process was stopped"
                return [], Failure(Cause.TIMEOUT, "length", "DeadlineExceeded", message)
            message = f"the measuring process died while it measured the record: {cause}"
            return [], Failure(Cause.CRASH, "length", "MeasurerDied", message)
        return [chunk] if spans else [], None

    # -- the process's life

    def _spawn(self, *, delay_s: float = 0.0) -> None:
        self._measurer = Measurer(self._measurer.settings, self._measurer.setup)
        self._launched(self._measurer, delay_s)

    def _launched(self, measurer: Measurer, delay_s: float = 0.0) -> None:
        task = asyncio.get_running_loop().create_task(self._live(measurer, delay_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _live(self, measurer: Measurer, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._wake.wait()
        code: int | None = None
        try:
            if not self._stopping and not measurer.dismissed:
                code = await self._run(measurer)
        except OSError as error:
            measurer.start_message = f"the process cannot be started: {error}"
        except Exception as error:  # noqa: BLE001 - whatever it is, the processor must know
            self._events.on_fatal(InternalError(error, where="the measuring process's supervision"))
        finally:
            self._cancel_timer(measurer)
            self._kill(measurer, "stopped")
        try:
            if not self._stopping:
                self._ended(measurer, code)
        except Exception as error:  # noqa: BLE001 - the records that it held would never be answered
            self._events.on_fatal(InternalError(error, where="the end of the measuring process"))

    async def _run(self, measurer: Measurer) -> int:
        process = await self._launch(
            measurer.settings,
            lambda frame: self._on_frame(measurer, frame),
            lambda why: self._on_garbage(measurer, why),
            lambda: self._on_disconnected(measurer),
        )
        try:
            measurer.process, measurer.pid = process, process.pid
            if self._stopping or measurer.dismissed:
                self._kill(measurer, "stopped")
            process.write(encode_frame(Kind.SETUP, measurer.setup))
            self._allow(measurer, measurer.settings.initialize_timeout_s, "initialize timed out")
            return await process.wait()
        finally:
            await process.close()

    def _ended(self, measurer: Measurer, code: int | None) -> None:
        """The process is gone: its chunks are to be measured again, by another."""
        was_starting = measurer.state == "starting"
        measurer.state = "ended"
        if measurer.dismissed:
            return
        cause = measurer.kill_message or measurer.kill_reason or describe_exit(code)
        held = list(measurer.chunks)
        measurer.chunks.clear()
        if measurer is self._candidate:
            self.refuse(f"its process that measures lengths did not become ready: {measurer.start_message or cause}")
        elif was_starting:
            self._start_failed(measurer, cause)
        else:
            log.warning("the measuring process (pid %d) ended: %s; starting another", measurer.pid, cause)
            self._restarted("deadline" if measurer.overdue is not None else _cause_label(code))
            # No pause after one that had done work, or lengths would be late for a death that is not of their making.
            self._spawn(delay_s=0.0 if measurer.answered else measurer.settings.restart_backoff_ms / 1_000)
        if held:
            fallen, failure = self._fell(held[0], measurer, cause)
            self._again[:0] = [*fallen, *(chunk for chunk in held[1:] if chunk.left())]
            if failure is not None:
                self._events.on_unmeasured(held[0].task, [(held[0].left()[0], [failure])])

    def _start_failed(self, measurer: Measurer, cause: str) -> None:
        self._failed_starts += 1
        failures, detail = self._failed_starts, measurer.start_message or cause
        if measurer.start_hopeless or failures >= measurer.settings.start_attempts:
            times = "" if failures == 1 else f", tried {failures} times in a row"
            message = f"the process that measures lengths did not start{times}: {detail}"
            self._events.on_fatal(WorkerStartError(message, attempts=failures, detail=detail))
            return
        log.warning("the measuring process did not start (attempt %d): %s", failures, detail)
        self._restarted("start_failed")
        delay_s = min(measurer.settings.restart_backoff_ms / 1_000 * 2 ** (failures - 1), MAX_RESTART_BACKOFF_S)
        self._spawn(delay_s=delay_s)

    def _restarted(self, cause: RestartCause) -> None:
        self.restarts += 1
        self._events.on_restart(cause)

    def _kill(self, measurer: Measurer, reason: str, message: str = "") -> None:
        if measurer.process is not None and measurer.process.kill() and measurer.kill_reason is None:
            measurer.kill_reason, measurer.kill_message = reason, message

    def _allow(self, measurer: Measurer, seconds: float, reason: str) -> None:
        """From now on it may take so long for what it does."""
        due = self._clock() + seconds
        measurer.timer = asyncio.get_running_loop().call_later(seconds, self._on_due, measurer, due, seconds, reason)

    def _on_due(self, measurer: Measurer, due: float, seconds: float, reason: str) -> None:
        if self._clock() - due <= STOPPED_FOR_S:
            measurer.overdue = measurer.chunks[0] if measurer.chunks else None
            self._kill(measurer, reason, f"it took more than {seconds:g} s")
        else:
            # This process stood still; the answer may be in the socket, which is read before this timer comes again.
            self._allow(measurer, seconds, reason)

    def _cancel_timer(self, measurer: Measurer) -> None:
        if measurer.timer is not None:
            measurer.timer.cancel()
            measurer.timer = None

    # -- the process's socket

    def _on_frame(self, measurer: Measurer, frame: Frame) -> None:
        try:
            if frame.kind is Kind.LENGTHS:
                self._on_lengths(measurer, frame)
            else:
                self._on_start(measurer, frame)
        except WireError:
            raise
        except Exception as error:  # noqa: BLE001 - in a callback of the loop it would only be logged
            self._events.on_fatal(InternalError(error, where="the lengths of records"))

    def _on_start(self, measurer: Measurer, frame: Frame) -> None:
        if measurer.state != "starting" or frame.kind not in (Kind.READY, Kind.START_FAILED):
            raise WireError(f"a frame {frame.kind.name}, which is not to be sent now")
        if frame.kind is Kind.START_FAILED:
            measurer.start_message = str(frame.head.get("message", ""))
            measurer.start_hopeless = bool(frame.head.get("final"))
            return
        self._cancel_timer(measurer)
        measurer.state = "ready"
        if measurer.taking_over is not None and not measurer.taking_over.done():
            measurer.taking_over.set_result(None)
        else:
            self._failed_starts = 0
            self.initialized.set()
        log.info("the measuring process (pid %d) is ready", measurer.pid)
        self._events.on_room()

    def _on_garbage(self, measurer: Measurer, why: str) -> None:
        self._fall_silent(measurer)
        self._kill(measurer, "garbage", f"its answers cannot be understood: {why}")

    def _on_disconnected(self, measurer: Measurer) -> None:
        self._fall_silent(measurer)
        if measurer.state != "ended":
            # Without its socket it is of no use; but mostly its process is just ending, and then knows better why.
            loop = asyncio.get_running_loop()
            loop.call_later(DISCONNECT_GRACE_S, self._kill, measurer, "closed", "it closed its connection")

    def _fall_silent(self, measurer: Measurer) -> None:
        """It gets nothing more; a process that had been ready has not failed to start."""
        if measurer.state == "ready":
            measurer.state = "ending"


def _taken(waiting: deque[Span]) -> list[Span | None]:
    """The oldest records, as many as go into a chunk; one at least."""
    taken: list[Span | None] = []
    room, room_bytes = MAX_CHUNK_RECORDS, MAX_CHUNK_BYTES
    while waiting and room > 0 and room_bytes > 0:
        span = waiting.popleft()
        count = min(room, max(1, len(span.records) * room_bytes // max(span.size_bytes, 1)))
        if count < len(span.records):
            span, rest = span.split(count)
            waiting.appendleft(rest)
        taken.append(span)
        room -= len(span.records)
        room_bytes -= span.size_bytes
    return taken


def _answer(measurer: Measurer, frame: Frame) -> tuple[list[int], list[Failure]]:
    """The lengths, and why those are missing that are. Raises WireError where this is no answer to what is measured."""
    chunk = measurer.chunks[0] if measurer.chunks else None
    if chunk is None or frame.head.get("id") != chunk.id:
        raise WireError(f"an answer to chunk {frame.head.get('id')!r:.40}, which is not being measured")
    lengths = decode_lengths(frame.body, sum(chunk.counts))
    reasons = frame.head.get("failures")
    if not isinstance(reasons, list) or len(reasons) != lengths.count(UNMEASURED):
        raise WireError("another number of reasons than of lengths that are missing")
    failures = []
    for reason in reasons:
        match reason:
            case [str(kind), str(message)]:
                failures.append(Failure(Cause.INVALID, "length", kind, message))
            case _:
                raise WireError("a reason that is none")
    return lengths, failures


def _runs(lengths: list[int]) -> list[tuple[int, int]]:
    """Neighbours that all have a length, or have none: first and one after the last."""
    runs: list[tuple[int, int]] = []
    start = 0
    for index in range(1, len(lengths) + 1):
        if index == len(lengths) or (lengths[index] == UNMEASURED) != (lengths[start] == UNMEASURED):
            runs.append((start, index))
            start = index
    return runs


def _cause_label(code: int | None) -> RestartCause:
    return "killed" if code is not None and code < 0 else "exited"
