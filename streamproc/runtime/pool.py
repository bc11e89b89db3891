"""Supervises the worker processes: starts, feeds, times, replaces and recycles them.

Nothing here blocks; everything happens in the event loop, on the workers' sockets, their ends and timers together.
A worker has at most one batch running and one queued. Nothing is retried here: a batch that a worker took down with it
comes back through ``on_failed``, and one that was only queued there comes back as unexecuted.

    starting ──READY──► ready ◄──► not ready        by the backend's ready()
       │                  │
       │ dies             │ dies, or computes past its deadline and is killed; or is recycled
       ▼                  ▼
    started again after a back-off; ``start_attempts`` failures in a row stop the processor

Order: none is promised across workers. At shutdown ``stop`` lets nobody finish: the processor drains first.

Invariants: every batch that was submitted is answered exactly once, by ``on_reply`` or ``on_failed``, unless the pool
was stopped; a dead worker's queued batch was never executed; recycling begins the new worker before it ends the old.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from streamproc.errors import InternalError, StreamprocError, WorkerStartError
from streamproc.records import Batch, Failure, Status
from streamproc.runtime.codec import decode_failure
from streamproc.runtime.wire import (
    BATCHES_PER_WORKER,
    Frame,
    FrameReceiver,
    Kind,
    Segment,
    WireError,
    are_metrics,
    batch_parts,
    decode_reply,
    encode_frame,
    read_reply,
)
from streamproc.settings import PoolSettings

MAX_RESTART_BACKOFF_S = 30.0
EXIT_GRACE_S = 5.0
DISCONNECT_GRACE_S = 0.5
RECYCLE_AGAIN_AFTER_S = 60.0
SOCKET_BUFFER_BYTES = 1_048_576
_ROOT = str(Path(__file__).resolve().parents[2])
_BOOT = (
    f"import sys; {_ROOT!r} in sys.path or sys.path.append({_ROOT!r}); "
    "from streamproc.runtime.worker import main; main()"
)
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Reply:
    """A batch that was executed: a status and a value per record, and what was measured (milliseconds)."""

    batch: Batch
    worker: int
    statuses: bytes
    values: list[memoryview]
    metrics: dict[str, Any]
    decode_ms: float
    encode_ms: float
    wall_ms: float


@dataclass(slots=True)
class PoolEvents:
    """What the pool tells its owner. ``on_failed`` says whether the batch was being executed."""

    on_reply: Callable[[Reply], None]
    on_failed: Callable[[Batch, Failure, bool, int], None]
    on_room: Callable[[], None]
    on_restart: Callable[[str], None]
    on_fatal: Callable[[StreamprocError], None]


@dataclass(slots=True, eq=False)
class Worker:
    """One worker process and what it is doing."""

    index: int
    state: str = "starting"
    pid: int = 0
    ready: bool = False
    batches: deque[Batch] = field(default_factory=deque)
    batches_done: int = 0
    running_since: float | None = None
    initialize_s: float | None = None
    rss_bytes: int = 0
    kill_reason: str | None = None
    start_message: str = ""
    start_hopeless: bool = False
    process: asyncio.subprocess.Process | None = None
    transport: asyncio.Transport | None = None
    segments: list[Segment] = field(default_factory=list)
    sent: int = 0
    timer: asyncio.TimerHandle | None = None
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    replaces: Worker | None = None
    successor: Worker | None = None
    kept_until: float = -math.inf

    @property
    def open(self) -> bool:
        """Whether it may be given batches."""
        return self.ready and self.state in ("ready", "outgoing")


def worker_environment(settings: PoolSettings, index: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the worker with this index: threads, devices, and what ``pool.env`` says, over ``environ``."""
    threads = settings.threads_per_worker or max(1, (os.cpu_count() or 1) // settings.workers)
    environment = {**environ, "STREAMPROC_WORKER": str(index)}
    for variable in _THREAD_VARIABLES:
        if settings.threads_per_worker is not None or variable not in environment:
            environment[variable] = str(threads)
    if settings.devices:
        environment["CUDA_VISIBLE_DEVICES"] = settings.devices[index % len(settings.devices)]
    return {**environment, **settings.env}


class Pool:
    """The worker processes of a processor."""

    def __init__(
        self, settings: PoolSettings, setup: dict[str, Any], events: PoolEvents, clock: Callable[[], float]
    ) -> None:
        self._settings = settings
        self._setup = setup
        self._events = events
        self._clock = clock
        self._workers: dict[int, Worker] = {}
        self._alive: set[Worker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed_starts: dict[int, int] = {}
        self._restarts: dict[int, int] = {}
        self._stopping = False
        self._wake = asyncio.Event()
        """Ends the pauses before restarts when the pool stops."""
        self.initialized = asyncio.Event()
        """Set once a worker has initialized the backend."""

    # -- what the processor asks

    async def start(self) -> None:
        """Start every worker; the event ``on_room`` says when one can take batches."""
        for index in range(self._settings.workers):
            self._spawn(index)

    def idle(self) -> int:
        """How many workers are ready and have nothing to do."""
        return sum(1 for worker in self._workers.values() if worker.open and not worker.batches)

    def room(self) -> int:
        """How many batches could be submitted now, counting one queued behind a running one."""
        return sum(BATCHES_PER_WORKER - len(worker.batches) for worker in self._workers.values() if worker.open)

    def workers(self) -> list[Worker]:
        """Every worker that has not ended, by index."""
        return sorted(self._workers.values(), key=lambda worker: worker.index)

    def restarts(self, index: int) -> int:
        """How often the worker of this index was replaced."""
        return self._restarts.get(index, 0)

    def submit(self, batch: Batch) -> None:
        """Give a batch to the worker with the least to do; only while there is ``room``."""
        worker = min((w for w in self._workers.values() if w.open), key=lambda w: len(w.batches))
        if len(worker.batches) >= BATCHES_PER_WORKER:
            raise AssertionError("submitted without room")
        self._send(worker, batch)
        worker.batches.append(batch)
        if len(worker.batches) == 1:
            self._begin(worker)

    async def stop(self) -> None:
        """End every worker, kindly where it is idle, and wait for the ends."""
        self._stopping = True
        self._wake.set()
        workers = list(self._alive)
        for worker in workers:
            self._cancel_timer(worker)
            if worker.transport is not None and worker.state != "starting" and not worker.batches:
                worker.transport.write(encode_frame(Kind.STOP, {}))
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

    # -- one worker's life

    def _spawn(self, index: int, *, delay_s: float = 0.0, replaces: Worker | None = None) -> None:
        worker = Worker(index, replaces=replaces)
        self._alive.add(worker)
        if replaces is None:
            self._workers[index] = worker
        else:
            replaces.successor = worker
        task = asyncio.get_running_loop().create_task(self._live(worker, delay_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _live(self, worker: Worker, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._wake.wait()
        code: int | None = None
        try:
            if not self._stopping:
                code = await self._run(worker)
        except OSError as error:
            worker.start_message = f"the process cannot be started: {error}"
        except Exception as error:  # noqa: BLE001 - whatever it is, the processor must know
            self._events.on_fatal(InternalError(error, where="a worker's supervision"))
        finally:
            self._cancel_timer(worker)
            self._kill(worker, "stopped")
            for segment in worker.segments:
                segment.close()
            self._alive.discard(worker)
        try:
            if not self._stopping:
                self._ended(worker, code)
        except Exception as error:  # noqa: BLE001 - the batches that it held would never be answered
            self._events.on_fatal(InternalError(error, where="the end of a worker"))

    async def _run(self, worker: Worker) -> int:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        with theirs:
            try:
                for _ in range(2 * BATCHES_PER_WORKER):
                    worker.segments.append(Segment.create())
                descriptors = [theirs.fileno(), *(segment.fd for segment in worker.segments)]
                worker.process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-c",
                    _BOOT,
                    str(descriptors[0]),
                    str(os.getpid()),
                    *map(str, descriptors[1:]),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else None,
                    pass_fds=descriptors,
                    env=worker_environment(self._settings, worker.index, os.environ),
                    # Ctrl-C in the terminal must not reach it before it can ignore it.
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        worker.pid = worker.process.pid
        if self._stopping:
            self._kill(worker, "stopped")
        transport, _ = await loop.create_unix_connection(
            lambda: self._receiver(worker),
            sock=ours,
        )
        worker.transport = transport
        setup = {**self._setup, "index": worker.index}
        worker.transport.write(encode_frame(Kind.SETUP, setup))
        worker.timer = loop.call_later(self._settings.initialize_timeout_s, self._kill, worker, "initialize timed out")
        code = await worker.process.wait()
        worker.ready = False
        # What the backend started (loaders of data, say) is in the worker's group, and of no use without it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
        # A reply written just before the end is still in the socket; a grandchild may hold the socket open.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await worker.closed.wait()
        worker.transport.close()
        return code

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
        if worker.kill_reason == "recycled":
            return
        cause = worker.kill_reason or _describe_exit(code)
        if worker.replaces is not None:
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
        return 0.0 if worker.batches_done else self._settings.restart_backoff_ms / 1_000

    def _start_failed(self, worker: Worker, cause: str) -> None:
        failures = self._failed_starts.get(worker.index, 0) + 1
        self._failed_starts[worker.index] = failures
        detail = worker.start_message or cause
        if worker.start_hopeless or failures >= self._settings.start_attempts:
            times = "" if failures == 1 else f", tried {failures} times in a row"
            message = f"worker {worker.index} did not start{times}: {detail}"
            self._events.on_fatal(WorkerStartError(message, attempts=failures, detail=detail))
            return
        log.warning("worker %d did not start (attempt %d): %s", worker.index, failures, detail)
        self._events.on_restart("start_failed")
        delay = min(self._settings.restart_backoff_ms / 1_000 * 2 ** (failures - 1), MAX_RESTART_BACKOFF_S)
        self._spawn(worker.index, delay_s=delay)

    def _death(self, worker: Worker, cause: str) -> Failure:
        if worker.kill_reason == "deadline":
            seconds = self._settings.batch_timeout_s
            return Failure(
                "worker", "DeadlineExceeded", f"the batch computed for more than {seconds:g} s and was stopped"
            )
        return Failure("worker", "WorkerDied", f"the worker process died while it ran the batch: {cause}")

    def _kill(self, worker: Worker, reason: str) -> None:
        if worker.process is not None and worker.process.returncode is None:
            worker.kill_reason = worker.kill_reason or reason
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.process.pid, signal.SIGKILL)

    # -- one worker's socket

    def _send(self, worker: Worker, batch: Batch) -> None:
        head: dict[str, Any] = {
            "id": batch.id,
            "task": batch.task,
            "opened_at": batch.opened_at,
            "spans": [(*span.lease.partition, len(span.records)) for span in batch.spans],
        }
        parts, size = batch_parts(batch.spans)
        transport = worker.transport
        if transport is None:
            raise AssertionError("submitted to a worker without a connection")
        if size >= self._settings.shared_memory_threshold_bytes:
            slot = worker.sent % BATCHES_PER_WORKER
            worker.sent += 1
            worker.segments[slot].write(parts, size)
            transport.write(encode_frame(Kind.BATCH, {**head, "slot": slot, "shared": size}))
        else:
            transport.write(encode_frame(Kind.BATCH, head, parts, size))

    def _begin(self, worker: Worker) -> None:
        """The worker's first batch runs from now on; its deadline with it."""
        worker.running_since = self._clock()
        worker.timer = asyncio.get_running_loop().call_later(
            self._settings.batch_timeout_s, self._kill, worker, "deadline"
        )

    def _receiver(self, worker: Worker) -> FrameReceiver:
        return FrameReceiver(
            lambda frame: self._on_frame(worker, frame),
            lambda why: self._on_garbage(worker, why),
            lambda: self._on_disconnected(worker),
            max_body_bytes=self._settings.shared_memory_threshold_bytes,
        )

    def _on_garbage(self, worker: Worker, why: str) -> None:
        """The user's code wrote to the worker's socket, say: no answer of this worker can be believed any more."""
        worker.ready = False
        self._kill(worker, f"its answers cannot be understood: {why}")

    def _on_frame(self, worker: Worker, frame: Frame) -> None:
        try:
            if frame.kind in (Kind.REPLY, Kind.FAILED):
                self._on_answer(worker, frame)
            elif frame.kind in (Kind.READY, Kind.NOT_READY):
                self._on_readiness(worker, frame)
            elif frame.kind is Kind.START_FAILED:
                worker.start_message = str(frame.head.get("message", ""))
                worker.start_hopeless = bool(frame.head.get("final"))
            else:
                self._on_garbage(worker, f"a frame {frame.kind.name}, which workers do not send")
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
        if worker.state == "starting":
            self._cancel_timer(worker)
            worker.initialize_s = _number(frame.head, "initialize_s")
            worker.state = "ready"
            self._failed_starts.pop(worker.index, None)
            self.initialized.set()
            log.info("worker %d (pid %d) initialized in %.3f s", worker.index, worker.pid, worker.initialize_s)
        worker.ready = frame.kind is Kind.READY
        if worker.ready and worker.replaces is not None:
            self._replace(worker.replaces, worker)
        if not worker.ready:
            log.warning("worker %d: the backend says that it is not ready", worker.index)
        self._events.on_room()

    def _on_disconnected(self, worker: Worker) -> None:
        worker.closed.set()
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
        limits = self._settings.recycle
        if self._clock() < worker.kept_until:
            return
        if limits.max_rss_mb is not None:
            with contextlib.suppress(psutil.Error):
                worker.rss_bytes = psutil.Process(worker.pid).memory_info().rss
        due = (limits.max_batches is not None and worker.batches_done >= limits.max_batches) or (
            limits.max_rss_mb is not None and worker.rss_bytes > limits.max_rss_mb * 1_048_576
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
        worker.kill_reason = "recycled"
        if worker.transport is not None:
            worker.transport.write(encode_frame(Kind.STOP, {}))
        worker.timer = asyncio.get_running_loop().call_later(EXIT_GRACE_S, self._kill, worker, "recycled")


def _answer(worker: Worker, frame: Frame) -> Reply | Failure:
    """What a frame says of the batch that its worker runs. Raises WireError where it cannot be an answer to that."""
    head = frame.head
    batch = worker.batches[0] if worker.batches else None
    if batch is None or batch.id != head.get("id"):
        raise WireError(f"an answer to batch {head.get('id')!r:.40}, which the worker does not run")
    try:
        if frame.kind is Kind.FAILED:
            stage, kind, message = (str(head[name]) for name in ("stage", "kind", "message"))
            return Failure(stage, kind, message, bool(head["retriable"]))
        if (size := head.get("shared")) is not None:
            segment = worker.segments[BATCHES_PER_WORKER : 2 * BATCHES_PER_WORKER][head["slot"]]
            statuses, values = read_reply(segment, size, batch.size)
        else:
            statuses, values = decode_reply(frame.body, batch.size)
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
        metrics=head["metrics"],
        decode_ms=_number(head, "decode_ms"),
        encode_ms=_number(head, "encode_ms"),
        wall_ms=_number(head, "wall_ms"),
    )


def _number(head: dict[str, Any], name: str) -> float:
    value = head.get(name)
    if not isinstance(value, int | float):
        raise WireError(f"a frame without {name}")
    return float(value)


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "it could not be started"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"
    return f"it exited with code {code}"


def _cause_label(kill_reason: str | None, code: int | None) -> str:
    if kill_reason == "deadline":
        return "deadline"
    return "killed" if code is not None and code < 0 else "exited"


def _has_descriptor(stream: Any) -> bool:
    try:
        return bool(stream.fileno() >= 0)
    except (AttributeError, OSError, ValueError):
        return False
