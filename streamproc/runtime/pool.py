"""Supervises the worker processes: starts, feeds, times, replaces, recycles and reloads them.

Nothing here blocks; everything happens in the event loop, on the workers' sockets, their ends and timers together.
A worker has at most one batch running and one queued. Nothing is retried here: a batch that a worker took down with it
comes back through ``on_failed``, and one that was only queued there comes back as unexecuted.

    starting ──READY──► ready ◄──► not ready        by the backend's ready()
       │                  │
       │ dies             │ dies, or computes past its deadline and is killed; or is recycled
       ▼                  ▼
    started again after a back-off; ``start_attempts`` failures in a row stop the processor

A deadline counts while this process runs too: where it was stopped itself (SIGSTOP, a laptop's lid), the time that a
batch may take begins anew.

A reload is a new *generation* of workers, with settings and code of its own. They are started beside the others, first
one and then, once it is ready, the rest. When all are ready ``switch`` gives them everything that is submitted from
then on; the others finish what they have, and end. Where one of the new does not become ready all of them are ended,
and nothing has changed.

Order: none is promised across workers. At shutdown ``stop`` lets nobody finish: the processor drains first.

Invariants: every batch that was submitted is answered exactly once, by ``on_reply`` or ``on_failed``, unless the pool
was stopped; a dead worker's queued batch was never executed; recycling begins the new worker before it ends the old;
no batch goes to a worker of a generation after one has gone to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from streamproc.errors import InternalError, ReloadRefusedError, StreamprocError, WorkerStartError
from streamproc.records import FIRST_GENERATION, Batch, Cause, Failure, Status
from streamproc.runtime.failures import decode_failure, failure_of
from streamproc.runtime.memory_limits import OutOfMemoryKills, kill_counter
from streamproc.runtime.wire import (
    BATCHES_PER_WORKER,
    Frame,
    Kind,
    WireError,
    are_metrics,
    batch_parts,
    decode_reply,
    encode_frame,
)
from streamproc.runtime.worker_process import WorkerProcess, describe_exit
from streamproc.settings import PoolSettings

MAX_RESTART_BACKOFF_S = 30.0
EXIT_GRACE_S = 5.0
DISCONNECT_GRACE_S = 0.5
RECYCLE_AGAIN_AFTER_S = 60.0
WATCH_MEMORY_EVERY_S = 0.1
STOPPED_FOR_S = 1.0
"""A timer that comes this late means that this whole process stood still, and perhaps the workers with it."""

_MIB = 1_048_576
_FROM_WORKERS = frozenset((Kind.READY, Kind.NOT_READY, Kind.START_FAILED, Kind.REPLY, Kind.FAILED))

Launch = Callable[
    [PoolSettings, int, Callable[[Frame], None], Callable[[str], None], Callable[[], None]], Awaitable[WorkerProcess]
]
"""Starts the worker of an index: its settings, the index, what to call with each frame, with what was wrong where
something else came, and at the end."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Reply:
    """A batch that was executed: a status and a value per record, and what was measured (milliseconds).

    ``sizes`` holds the bytes of the values of each of its spans. ``peak_bytes`` is the most memory that the worker held
    meanwhile, None where that is not known, and ``peak_of`` says whose it is: the ``host``'s or ``cuda``'s;
    ``model_bytes`` is the most that estimates have for a batch that its process ran.
    """

    batch: Batch
    worker: int
    statuses: bytes
    values: list[memoryview]
    sizes: list[int]
    metrics: dict[str, Any]
    decode_ms: float
    encode_ms: float
    wall_ms: float
    peak_bytes: float | None = None
    peak_of: str | None = None
    model_bytes: float = 0.0


@dataclass(slots=True)
class PoolEvents:
    """What the pool tells its owner. ``on_failed`` says whether the batch was being executed."""

    on_reply: Callable[[Reply], None]
    on_failed: Callable[[Batch, Failure, bool, int], None]
    on_room: Callable[[], None]
    on_restart: Callable[[str], None]
    on_fatal: Callable[[StreamprocError], None]


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """What workers are started with."""

    number: int
    settings: PoolSettings
    setup: dict[str, Any]
    declared: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By task, the JSON Schemas of ``input`` and ``output`` that its backend declares; once a worker has said so."""


@dataclass(slots=True, eq=False)
class Worker:
    """One worker process and what it is doing."""

    index: int
    generation: Generation
    state: str = "starting"
    pid: int = 0
    ready: bool = False
    batches: deque[Batch] = field(default_factory=deque)
    batches_done: int = 0
    running_since: float | None = None
    model_bytes: float = 0.0
    """The most that estimates have for a batch that it ran: what was freed of it, it may hold for ever."""
    initialize_s: float | None = None
    rss_bytes: int = 0
    kill_reason: str | None = None
    kill_message: str = ""
    start_message: str = ""
    start_hopeless: bool = False
    process: WorkerProcess | None = None
    launched: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it has a process, or will have none."""
    sent: int = 0
    timer: asyncio.TimerHandle | None = None
    replaces: Worker | None = None
    successor: Worker | None = None
    kept_until: float = -math.inf
    dismissed: bool = False
    """Whether it was told to end, and nothing is to follow from that."""

    @property
    def open(self) -> bool:
        """Whether it may be given batches."""
        return self.ready and self.state in ("ready", "outgoing")


@dataclass(slots=True, eq=False)
class Candidates:
    """The workers of the next generation, until they take over or are refused."""

    generation: Generation
    ready: asyncio.Future[None]
    """Set once all of them are; or to why they are refused."""
    workers: dict[int, Worker] = field(default_factory=dict)


class Pool:
    """The worker processes of a processor."""

    def __init__(
        self,
        settings: PoolSettings,
        setup: dict[str, Any],
        events: PoolEvents,
        clock: Callable[[], float],
        *,
        launch: Launch = WorkerProcess.launch,
        kills: OutOfMemoryKills | None = None,
    ) -> None:
        """``launch`` starts a process; ``kills`` are the kernel's for the lack of memory, those of our own group."""
        self._generation = Generation(FIRST_GENERATION, settings, setup)
        self._candidates: Candidates | None = None
        self._refused_because = ""
        self._events = events
        self._clock = clock
        self._launch = launch
        self._kills = kills or OutOfMemoryKills(kill_counter())
        self._memory_watch: asyncio.TimerHandle | None = None
        """Runs while a worker computes and ``max_worker_memory_mb`` is set."""
        self._workers: dict[int, Worker] = {}
        self._alive: set[Worker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed_starts: dict[int, int] = {}
        self._restarts: dict[int, int] = {}
        self._stopping = False
        self._wake = asyncio.Event()
        """Ends the pauses before restarts when the pool stops."""
        self.initialized = asyncio.Event()
        """Set once a worker has initialized the backend; one that a reload may still refuse does not count."""

    # -- what the processor asks

    async def start(self) -> None:
        """Start every worker's process; the event ``on_room`` says when one can take batches."""
        for index in range(self._generation.settings.workers):
            self._spawn(index)
        for worker in self.workers():
            await worker.launched.wait()

    def idle(self) -> int:
        """How many workers are ready and have nothing to do."""
        return sum(1 for worker in self._workers.values() if worker.open and not worker.batches)

    def room(self) -> int:
        """How many batches could be submitted now, counting one queued behind a running one."""
        return sum(BATCHES_PER_WORKER - len(worker.batches) for worker in self._workers.values() if worker.open)

    def workers(self) -> list[Worker]:
        """Every worker that has not ended, by index."""
        return sorted(self._workers.values(), key=lambda worker: worker.index)

    @property
    def declared(self) -> dict[str, dict[str, Any]]:
        """By task, the JSON Schemas of ``input`` and ``output`` that the backend in force declares, once loaded."""
        return self._generation.declared

    def restarts(self, index: int) -> int:
        """How often the worker of this index was replaced."""
        return self._restarts.get(index, 0)

    def submit(self, batch: Batch) -> None:
        """Give a batch to the worker with the least to do; only while there is ``room``."""
        worker = min((w for w in self._workers.values() if w.open), key=lambda w: len(w.batches))
        if len(worker.batches) >= BATCHES_PER_WORKER:
            raise AssertionError("submitted without room")
        self._send(worker, batch)
        batch.generation = worker.generation.number
        worker.batches.append(batch)
        if len(worker.batches) == 1:
            self._begin(worker)

    def look_for_kills(self) -> None:
        """Note whom the kernel ended for the lack of memory; to be called about every second."""
        self._kills.look(self._clock())

    async def stop(self) -> None:
        """End every worker, kindly where it is idle, and wait for the ends."""
        self._stopping = True
        self.refuse("the processor is stopping")
        self._wake.set()
        if self._memory_watch is not None:
            self._memory_watch.cancel()
        workers = list(self._alive)
        for worker in workers:
            self._cancel_timer(worker)
            if worker.process is not None and worker.state != "starting" and not worker.batches:
                worker.process.write(encode_frame(Kind.STOP, {}))
            else:
                self._kill(worker, "stopped")
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=EXIT_GRACE_S)
            for worker in workers:
                self._kill(worker, "stopped")
            if pending:
                await asyncio.wait(pending, timeout=EXIT_GRACE_S)

    def kill(self) -> None:
        """End every worker at once, without waiting."""
        self._stopping = True
        for worker in self._alive:
            self._kill(worker, "stopped")

    # -- the next generation

    @property
    def generation(self) -> int:
        """The number of the generation that batches are submitted to."""
        return self._generation.number

    async def prepare(self, settings: PoolSettings, setup: dict[str, Any]) -> None:
        """Start workers with these beside those that work, and wait until each of them is ready; then ``switch``.

        Raises:
            ReloadRefusedError: one of them did not become ready. All of them are ended, and nothing has changed.
        """
        generation = Generation(self._generation.number + 1, settings, setup)
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._candidates = Candidates(generation, ready)
        self._start_candidates()
        try:
            await ready
        finally:
            if ready.cancelled():
                self.refuse("nobody waits for it any more")

    def switch(self) -> None:
        """What is submitted from now on goes to the workers that ``prepare`` has made ready; the others finish.

        Raises:
            ReloadRefusedError: one of them is not ready any more. All of them are ended, and nothing has changed.
        """
        candidates = self._candidates
        if candidates is not None and not self._are_ready(candidates):
            self.refuse("one of its workers is not ready any more")
            candidates = None
        if candidates is None:
            raise ReloadRefusedError(self._refused_because)
        self._candidates = None
        self._generation = candidates.generation
        outgoing, self._workers = self._workers, candidates.workers
        self._failed_starts.clear()
        self.initialized.set()
        for worker in outgoing.values():
            self._retire(worker)
        self._events.on_room()

    def refuse(self, why: str) -> None:
        """End the workers of the next generation, where there are any."""
        candidates, self._candidates = self._candidates, None
        if candidates is None:
            return
        self._refused_because = why
        for worker in candidates.workers.values():
            self._drop(worker)
        if not candidates.ready.done():
            candidates.ready.set_exception(ReloadRefusedError(why))

    def _start_candidates(self) -> None:
        """Start the first; once it is ready, the others: a version that does not load costs one process."""
        candidates = self._candidates
        if candidates is None:
            return
        count = candidates.generation.settings.workers
        for index in range(count if candidates.workers else 1):
            if index not in candidates.workers:
                candidates.workers[index] = self._launched(Worker(index, candidates.generation))
        if self._are_ready(candidates) and not candidates.ready.done():
            candidates.ready.set_result(None)

    def _is_candidate(self, worker: Worker) -> bool:
        return self._candidates is not None and self._candidates.workers.get(worker.index) is worker

    @staticmethod
    def _are_ready(candidates: Candidates) -> bool:
        workers = candidates.workers.values()
        return len(workers) == candidates.generation.settings.workers and all(worker.open for worker in workers)

    def _retire(self, worker: Worker) -> None:
        """It gets no more batches; once it has answered those that it has, it ends."""
        if (successor := worker.successor) is not None:
            worker.successor = successor.replaces = None
            self._drop(successor)
        if worker.batches:
            worker.state = "retiring"
        elif worker.open:
            worker.state = "retiring"
            self._dismiss(worker)
        else:
            self._drop(worker)

    def _drop(self, worker: Worker) -> None:
        """End it at once, or before it begins; it has no batches."""
        worker.dismissed = True
        self._kill(worker, "dismissed")

    # -- one worker's life

    def _spawn(self, index: int, *, delay_s: float = 0.0, replaces: Worker | None = None) -> None:
        worker = Worker(index, self._generation, replaces=replaces)
        if replaces is None:
            self._workers[index] = worker
        else:
            replaces.successor = worker
        self._launched(worker, delay_s)

    def _launched(self, worker: Worker, delay_s: float = 0.0) -> Worker:
        self._alive.add(worker)
        task = asyncio.get_running_loop().create_task(self._live(worker, delay_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return worker

    async def _live(self, worker: Worker, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._wake.wait()
        code: int | None = None
        try:
            if not self._stopping and not worker.dismissed:
                code = await self._run(worker)
        except OSError as error:
            worker.start_message = f"the process cannot be started: {error}"
        except Exception as error:  # noqa: BLE001 - whatever it is, the processor must know
            self._events.on_fatal(InternalError(error, where="a worker's supervision"))
        finally:
            worker.launched.set()
            self._cancel_timer(worker)
            self._kill(worker, "stopped")
            self._alive.discard(worker)
        try:
            if not self._stopping:
                self._ended(worker, code)
        except Exception as error:  # noqa: BLE001 - the batches that it held would never be answered
            self._events.on_fatal(InternalError(error, where="the end of a worker"))

    async def _run(self, worker: Worker) -> int:
        settings = worker.generation.settings
        process = await self._launch(
            settings,
            worker.index,
            lambda frame: self._on_frame(worker, frame),
            lambda why: self._on_garbage(worker, why),
            lambda: self._on_disconnected(worker),
        )
        try:
            worker.process, worker.pid = process, process.pid
            worker.launched.set()
            if self._stopping or worker.dismissed:
                self._kill(worker, "stopped")
            process.write(encode_frame(Kind.SETUP, {**worker.generation.setup, "index": worker.index}))
            self._allow(worker, settings.initialize_timeout_s, "initialize timed out")
            return await process.wait()
        finally:
            worker.ready = False
            await process.close()

    def _ended(self, worker: Worker, code: int | None) -> None:
        """A worker's process is gone: answer for its batches and start another."""
        was_starting = worker.state == "starting"
        worker.state = "ended"
        worker.ready = False
        held = list(worker.batches)
        worker.batches.clear()
        current = self._workers.get(worker.index) is worker
        if current:
            del self._workers[worker.index]
        if worker.dismissed:
            return
        if worker.kill_reason is None and code == -signal.SIGKILL and self._kills.explain(self._clock()):
            worker.kill_reason = "oom"
            worker.kill_message = "the kernel ended it, since its control group ran out of memory"
        cause = worker.kill_message or worker.kill_reason or describe_exit(code)
        if self._is_candidate(worker):
            self.refuse(f"its worker {worker.index} did not become ready: {worker.start_message or cause}")
        elif worker.replaces is not None:
            self._keep(worker.replaces, worker.start_message or cause)
        elif was_starting:
            self._start_failed(worker, cause)
        elif current:
            log.warning("worker %d (pid %d) ended: %s; starting another", worker.index, worker.pid, cause)
            self._restarts[worker.index] = self._restarts.get(worker.index, 0) + 1
            self._events.on_restart(_cause_label(worker.kill_reason, code))
            if worker.successor is not None:
                worker.successor.replaces = None
                self._workers[worker.index] = worker.successor
            else:
                self._spawn(worker.index, delay_s=self._backoff_s(worker))
        for position, batch in enumerate(held):
            if position == 0 and worker.running_since is not None:
                self._events.on_failed(batch, self._death(worker, cause), True, worker.index)
            else:
                self._events.on_failed(batch, self._death(worker, cause), False, worker.index)

    def _backoff_s(self, worker: Worker) -> float:
        """No pause after the death of a worker that had done work; otherwise the pause of a failed start."""
        return 0.0 if worker.batches_done else worker.generation.settings.restart_backoff_ms / 1_000

    def _start_failed(self, worker: Worker, cause: str) -> None:
        settings = worker.generation.settings
        failures = self._failed_starts.get(worker.index, 0) + 1
        self._failed_starts[worker.index] = failures
        detail = worker.start_message or cause
        if worker.start_hopeless or failures >= settings.start_attempts:
            times = "" if failures == 1 else f", tried {failures} times in a row"
            message = f"worker {worker.index} did not start{times}: {detail}"
            self._events.on_fatal(WorkerStartError(message, attempts=failures, detail=detail))
            return
        log.warning("worker %d did not start (attempt %d): %s", worker.index, failures, detail)
        self._events.on_restart("start_failed")
        delay = min(settings.restart_backoff_ms / 1_000 * 2 ** (failures - 1), MAX_RESTART_BACKOFF_S)
        self._spawn(worker.index, delay_s=delay)

    def _death(self, worker: Worker, cause: str) -> Failure:
        if worker.kill_reason == "deadline":
            seconds = worker.generation.settings.batch_timeout_s
            message = f"the batch computed for more than {seconds:g} s and was stopped"
            return Failure(Cause.TIMEOUT, "worker", "DeadlineExceeded", message)
        message = f"the worker process died while it ran the batch: {cause}"
        if worker.kill_reason == "oom":
            return Failure(Cause.OOM, "worker", "OutOfMemory", message)
        return Failure(Cause.CRASH, "worker", "WorkerDied", message)

    def _kill(self, worker: Worker, reason: str, message: str = "") -> None:
        if worker.process is not None and worker.process.kill() and worker.kill_reason is None:
            worker.kill_reason, worker.kill_message = reason, message

    # -- limits of one worker

    def _allow(self, worker: Worker, seconds: float, reason: str) -> None:
        """From now on it may take so long for what it does."""
        due = self._clock() + seconds
        worker.timer = asyncio.get_running_loop().call_later(seconds, self._on_due, worker, due, seconds, reason)

    def _on_due(self, worker: Worker, due: float, seconds: float, reason: str) -> None:
        late_s = self._clock() - due
        if late_s <= STOPPED_FOR_S:
            self._kill(worker, reason)
            return
        # Its answer may be in the socket, which is read before this timer comes again.
        log.warning(
            "this process stood still for about %.1f s; worker %d gets its %g s anew", late_s, worker.index, seconds
        )
        self._allow(worker, seconds, reason)

    def _watch_memory(self) -> None:
        """Look at the workers that compute, and come again while there are any."""
        self._memory_watch = None
        busy = [worker for worker in self._alive if worker.running_since is not None]
        for worker in busy:
            self._check_memory(worker)
        if busy and not self._stopping:
            self._memory_watch = asyncio.get_running_loop().call_later(WATCH_MEMORY_EVERY_S, self._watch_memory)

    def _check_memory(self, worker: Worker) -> bool:
        """Kill it where it holds more than it may; whether it did."""
        limit_mb = worker.generation.settings.max_worker_memory_mb
        if limit_mb is None or worker.process is None:
            return False
        worker.rss_bytes = worker.process.resident_bytes() or worker.rss_bytes
        if worker.rss_bytes <= limit_mb * _MIB:
            return False
        seen_mb = worker.rss_bytes // _MIB
        self._kill(worker, "oom", f"it held {seen_mb} MiB, more than pool.max_worker_memory_mb ({limit_mb}) allows")
        return True

    # -- one worker's socket

    def _send(self, worker: Worker, batch: Batch) -> None:
        head: dict[str, Any] = {
            "id": batch.id,
            "task": batch.task,
            "opened_at": batch.opened_at,
            "spans": [(*span.lease.partition, len(span.records)) for span in batch.spans],
        }
        if batch.trace is not None:
            head["traceparent"] = batch.trace.traceparent
            batch.trace.worker_pid = worker.pid
        parts, size = batch_parts(batch.spans)
        process = worker.process
        if process is None:
            raise AssertionError("submitted to a worker without a process")
        if size >= worker.generation.settings.shared_memory_threshold_bytes:
            slot = worker.sent % BATCHES_PER_WORKER
            worker.sent += 1
            process.segments[slot].write(parts, size)
            process.write(encode_frame(Kind.BATCH, {**head, "slot": slot, "shared": size}))
        else:
            process.write(encode_frame(Kind.BATCH, head, parts, size))

    def _begin(self, worker: Worker) -> None:
        """The worker's first batch runs from now on; its deadline with it."""
        worker.running_since = self._clock()
        worker.model_bytes = max(worker.model_bytes, worker.batches[0].model_bytes)
        settings = worker.generation.settings
        self._allow(worker, settings.batch_timeout_s, "deadline")
        if self._memory_watch is None and settings.max_worker_memory_mb is not None:
            self._memory_watch = asyncio.get_running_loop().call_later(WATCH_MEMORY_EVERY_S, self._watch_memory)

    def _on_garbage(self, worker: Worker, why: str) -> None:
        """The user's code wrote to the worker's socket, say: no answer of this worker can be believed any more."""
        worker.ready = False
        self._kill(worker, "garbage", f"its answers cannot be understood: {why}")

    def _on_frame(self, worker: Worker, frame: Frame) -> None:
        if frame.kind not in _FROM_WORKERS:
            raise WireError(f"a frame {frame.kind.name}, which workers do not send")
        try:
            if frame.kind in (Kind.REPLY, Kind.FAILED):
                self._on_answer(worker, frame)
            elif frame.kind in (Kind.READY, Kind.NOT_READY):
                self._on_readiness(worker, frame)
            else:
                worker.start_message = str(frame.head.get("message", ""))
                worker.start_hopeless = bool(frame.head.get("final"))
        except WireError:
            raise
        except Exception as error:  # noqa: BLE001 - in a callback of the loop it would only be logged
            self._events.on_fatal(InternalError(error, where="the answer of a worker"))

    def _on_answer(self, worker: Worker, frame: Frame) -> None:
        # The batch stays with the worker until its answer is known to be one.
        answer = _answer(worker, frame)
        batch = worker.batches.popleft()
        self._cancel_timer(worker)
        worker.running_since = None
        worker.batches_done += 1
        if worker.batches:
            self._begin(worker)
        if isinstance(answer, Failure):
            self._events.on_failed(batch, answer, True, worker.index)
        else:
            self._events.on_reply(answer)
        if worker.state == "retiring" and not worker.batches:
            self._dismiss(worker)
        elif worker.state == "ready":
            self._consider_recycling(worker)
        self._events.on_room()

    def _on_readiness(self, worker: Worker, frame: Frame) -> None:
        if worker.state == "starting" and self._check_memory(worker):
            # It would fail every batch, each for a fault that is not the batch's.
            worker.start_message = f"once initialized, {worker.kill_message}; raise it"
            worker.start_hopeless = True
            return
        if worker.state == "starting":
            if not self._is_candidate(worker):
                self._cancel_timer(worker)
                self._failed_starts.pop(worker.index, None)
                self.initialized.set()
            worker.initialize_s = _number(frame.head, "initialize_s")
            worker.generation.declared.update(_declared(frame.head))
            worker.state = "ready"
            log.info("worker %d (pid %d) initialized in %.3f s", worker.index, worker.pid, worker.initialize_s)
        was_ready, worker.ready = worker.ready, frame.kind is Kind.READY
        if worker.ready and worker.replaces is not None:
            self._replace(worker.replaces, worker)
        if worker.ready and self._is_candidate(worker):
            # Until now it had as long as it may take to initialize: nobody else would end the wait for its backend.
            self._cancel_timer(worker)
            self._start_candidates()
        elif was_ready and self._is_candidate(worker):
            self.refuse(f"its worker {worker.index} was ready, and is so no more")
        if not worker.ready:
            log.warning("worker %d: the backend says that it is not ready", worker.index)
        self._events.on_room()

    def _on_disconnected(self, worker: Worker) -> None:
        worker.ready = False
        if worker.state != "ended":
            # Without its socket it is of no use; but mostly its process is just ending, and then knows better why.
            asyncio.get_running_loop().call_later(
                DISCONNECT_GRACE_S, self._kill, worker, "the worker closed its connection"
            )

    def _cancel_timer(self, worker: Worker) -> None:
        if worker.timer is not None:
            worker.timer.cancel()
            worker.timer = None

    # -- recycling

    def _consider_recycling(self, worker: Worker) -> None:
        limits = worker.generation.settings.recycle
        if self._clock() < worker.kept_until or self._candidates is not None:
            return
        if limits.max_rss_mb is not None:
            worker.rss_bytes = (worker.process and worker.process.resident_bytes()) or worker.rss_bytes
        due = (limits.max_batches is not None and worker.batches_done >= limits.max_batches) or (
            limits.max_rss_mb is not None and worker.rss_bytes > limits.max_rss_mb * _MIB
        )
        if due and not any(other.state in ("starting", "outgoing") for other in self._workers.values()):
            # It goes on working until its successor is warm; the state keeps others from recycling meanwhile.
            worker.state = "outgoing"
            self._spawn(worker.index, replaces=worker)

    def _replace(self, old: Worker, new: Worker) -> None:
        new.replaces = None
        self._workers[new.index] = new
        self._restarts[new.index] = self._restarts.get(new.index, 0) + 1
        self._events.on_restart("recycled")
        old.state = "retiring"
        if not old.batches:
            self._dismiss(old)

    def _keep(self, old: Worker, why: str) -> None:
        """The successor of a worker did not come up: the old one stays, and is recycled that much later."""
        log.error("worker %d is not recycled, its successor did not become ready: %s", old.index, why)
        old.state = "ready"
        old.successor = None
        old.batches_done = 0
        old.kept_until = self._clock() + RECYCLE_AGAIN_AFTER_S

    def _dismiss(self, worker: Worker) -> None:
        worker.dismissed = True
        if worker.process is not None:
            worker.process.write(encode_frame(Kind.STOP, {}))
        worker.timer = asyncio.get_running_loop().call_later(EXIT_GRACE_S, self._kill, worker, "dismissed")


def _answer(worker: Worker, frame: Frame) -> Reply | Failure:
    """What a frame says of the batch that its worker runs. Raises WireError where it cannot be an answer to that."""
    head = frame.head
    batch = worker.batches[0] if worker.batches else None
    if batch is None or batch.id != head.get("id"):
        raise WireError(f"an answer to batch {head.get('id')!r:.40}, which the worker does not run")
    try:
        if frame.kind is Kind.FAILED:
            return failure_of(head["failure"])
        statuses, values, sizes = _results(worker, frame, [len(span.records) for span in batch.spans])
        if any(statuses):
            for status, value in zip(statuses, values, strict=True):
                if status == Status.FAILED:
                    decode_failure(value)
        if not are_metrics(head["metrics"]):
            raise WireError("a reply whose metrics are none")
    except (LookupError, TypeError, ValueError, OverflowError, OSError) as error:
        raise WireError(f"an answer with something wrong in it: {type(error).__name__}") from error
    return Reply(
        batch=batch,
        worker=worker.index,
        statuses=statuses,
        values=values,
        sizes=sizes,
        metrics=head["metrics"],
        decode_ms=_number(head, "decode_ms"),
        encode_ms=_number(head, "encode_ms"),
        wall_ms=_number(head, "wall_ms"),
        peak_bytes=None if head.get("peak_bytes") is None else _number(head, "peak_bytes"),
        peak_of=head.get("peak_of"),
        model_bytes=worker.model_bytes,
    )


def _results(worker: Worker, frame: Frame, counts: list[int]) -> tuple[bytes, list[memoryview], list[int]]:
    if (size := frame.head.get("shared")) is None:
        return decode_reply(frame.body, counts)
    if worker.process is None:
        raise AssertionError("answered by a worker without a process")
    segment = worker.process.segments[BATCHES_PER_WORKER:][frame.head["slot"]]
    # Copied, and let go of: a segment that is looked at could not grow.
    with segment.view(size) as body:
        return decode_reply(body, counts)


def _number(head: dict[str, Any], name: str) -> float:
    value = head.get(name)
    if not isinstance(value, int | float):
        raise WireError(f"a frame without {name}")
    return float(value)


def _declared(head: dict[str, Any]) -> dict[str, dict[str, Any]]:
    declared = head.get("declared", {})
    by_task = declared.values() if isinstance(declared, dict) else [None]
    if not all(isinstance(it, dict) and all(isinstance(schema, dict) for schema in it.values()) for it in by_task):
        raise WireError("a frame whose schemas are none")
    return dict(declared)


def _cause_label(kill_reason: str | None, code: int | None) -> str:
    if kill_reason in ("deadline", "oom"):
        return kill_reason
    return "killed" if code is not None and code < 0 else "exited"
