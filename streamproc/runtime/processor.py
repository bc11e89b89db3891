"""The processor: starts everything, gives batches to the pool, and stops everything in the right order.

This file and ``task_stream`` are the only ones that know all the stages. Dispatch is driven by events: records that
arrived, an answer from a worker, a worker that became ready, a deadline that passed; between them the processor sleeps.

Start: launch the workers, reach Kafka and its topics while they load, and join the groups once a worker is initialized:
       a replica whose model does not load takes no partition from the others.
Stop:  drain the tasks (nothing new is taken, what is in flight is settled) for at most ``shutdown_timeout_s``; then
       commit, leave the groups and end the workers, for at most ``CLOSE_TIMEOUT_S``; the sidecar last. What is not
       settled by then is not committed, and is read again after the next start. After a failure nothing is drained.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

import psutil

from streamproc.broker.interface import Connections
from streamproc.errors import BrokerError, InternalError, ReloadRefusedError, StreamprocError
from streamproc.observe.health import Health
from streamproc.observe.metrics import Metrics
from streamproc.observe.status import CircuitStatus, ProcessorStatus, ReloadStatus
from streamproc.records import Batch, Failure
from streamproc.runtime.alarm import Alarm
from streamproc.runtime.batch_plan import BatchPlan
from streamproc.runtime.fairness import Fairness, candidates
from streamproc.runtime.inspection import Inspector
from streamproc.runtime.measuring import Measuring, MeasuringEvents
from streamproc.runtime.pool import Pool, PoolEvents, Reply
from streamproc.runtime.requests import Request
from streamproc.runtime.startup import measurer_setup
from streamproc.runtime.task_stream import TaskStream
from streamproc.settings import Settings

if TYPE_CHECKING:
    from streamproc.observe.tracing import Tracing

TICK_S = 1.0
ENDS_EVERY_TICKS = 5
CLOSE_TIMEOUT_S = 10.0
CANCEL_GRACE_S = 0.5
HANDOVER_S = 0.0003
"""A window is due so long before its deadline: from the alarm to the worker's socket its batch takes about that."""

log = logging.getLogger(__name__)


class Processor:
    """One replica of an application. Belongs to one event loop; used once.

    Args:
        settings: What to run.
        setup: What the workers are told at their start, see ``startup.worker_setup``.
        connections: How to reach Kafka.
        plans: How the tasks' batches begin, see ``batch_plan.batch_plans``; without estimates by default.
        metrics: Where to count; a registry of its own by default.
        tracing: Makes spans; there are none without.
        clock: A clock that does not go back, in seconds.
        wall_clock: Seconds since 1970.
        rng: Jitters retries.
    """

    def __init__(
        self,
        settings: Settings,
        setup: Mapping[str, Any],
        connections: Connections,
        *,
        plans: Mapping[str, BatchPlan] | None = None,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics or Metrics()
        self.clock = clock
        self._connections = connections
        self._failure: StreamprocError | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._alarm = Alarm(self._dispatch, clock)
        self._dispatch_scheduled = False
        self._launched = False
        self._ticking: asyncio.Task[None] | None = None
        self._draining = False
        self._stopped = False
        self.reloading = False
        """Whether a reload is under way."""
        self.last_reload: ReloadStatus | None = None
        self.pool = Pool(
            settings.pool,
            dict(setup),
            PoolEvents(self._on_reply, self._on_failed, self._schedule, self._on_restart, self._on_fatal),
            clock,
        )
        self.measuring: Measuring | None = None
        """Tells the lengths of records, where tasks ask for those of a field or of the backend."""
        measured = measurer_setup(settings, setup)
        if measured is not None:
            events = MeasuringEvents(
                lambda task, spans: self.tasks[task].measured(spans),
                lambda task, failed: self.tasks[task].unmeasured(failed),
                self._schedule,
                self.metrics.measurer_restarted,
                self._on_fatal,
            )
            self.measuring = Measuring(settings.pool, measured, events, clock)
        ids = itertools.count(1)
        self.tasks = {
            name: TaskStream(
                name,
                settings,
                connections,
                self.metrics.task(name),
                plan=plans[name] if plans is not None else BatchPlan(settings.tasks[name].batch),
                measuring=self.measuring if measured is not None and name in measured["tasks"] else None,
                tracing=tracing,
                next_id=lambda: next(ids),
                rng=rng or random.Random(),  # noqa: S311 - jitter, no secret
                clock=clock,
                wall_clock=wall_clock,
                on_work=self._schedule,
                on_fatal=self._on_fatal,
            )
            for name in settings.tasks
        }
        self._lanes = {lane.name: lane for task in self.tasks.values() for lane in task.lanes}
        weights = {lane.name: settings.tasks[name].weight for name, task in self.tasks.items() for lane in task.lanes}
        self._fairness = Fairness(weights)
        self._inspector = Inspector(self, wall_clock)

    # -- life

    async def launch(self) -> None:
        """Start the child processes, as ``start`` does first, where it has not been done; ``stop`` ends them."""
        if not self._launched:
            self._launched = True
            await self.pool.start()
            if self.measuring is not None:
                await self.measuring.start()

    async def start(self) -> None:
        """Launch the workers, reach Kafka, join the groups. Raises StreamprocError; then ``stop`` cleans up."""
        await self.launch()
        await self._connections.probe()
        for task in self.tasks.values():
            await task.connect()
        self._ticking = asyncio.get_running_loop().create_task(self._tick(), name="tick")
        await self._unless_it_ends(self.pool.initialized.wait())
        if self.measuring is not None:
            await self._unless_it_ends(self.measuring.initialized.wait())
        for task in self.tasks.values():
            if not self._stopped:
                await task.join()

    async def until_ready(self) -> None:
        """Wait until ``ready`` says yes. Raises what ended the processor before."""
        while not self.ready().ok:
            await asyncio.wait({self._ended}, timeout=0.02)
            if self._ended.done():
                await self.wait()

    async def _unless_it_ends(self, work: Coroutine[Any, Any, object]) -> None:
        """Wait for work, or raise what ends the processor before it is done."""
        working = asyncio.ensure_future(work)
        waiting: set[asyncio.Future[Any]] = {self._ended, working}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await self.wait()

    async def wait(self) -> None:
        """Until the processor was stopped; raises the error that ended it, if one did."""
        await asyncio.shield(self._ended)
        if self._failure is not None:
            raise self._failure

    async def stop(self) -> None:
        """Drain, commit and close; within ``shutdown_timeout_s``. After a failure nothing is drained."""
        if self._stopped:
            return
        self._stopped = True
        self.pool.refuse("the processor is stopping")
        if self.measuring is not None:
            self.measuring.refuse("the processor is stopping")
        if self._failure is None:
            await self._drain()
        self._draining = True
        self._alarm.close()
        await self._close()
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        if not self._ended.done():
            self._ended.set_result(None)

    @property
    def too_busy_to_reload(self) -> str | None:
        """Why it can take no other version now; None where it can."""
        if self.stopping:
            return "the processor is stopping"
        return None if self._launched else "the processor is starting, with what the settings say now"

    async def reload(
        self, settings: Settings, setup: Mapping[str, Any], plans: Mapping[str, BatchPlan] | None = None
    ) -> None:
        """Start new workers with these, and once all are ready go on with them alone, by these settings.

        Only settings that ``reload`` lets change may differ from the present ones.

        Raises:
            ReloadRefusedError: they did not become ready, or the processor stops; nothing has changed.
        """
        measuring, measured = self.measuring, measurer_setup(settings, setup)
        try:
            if measuring is not None and measured is not None:
                await measuring.prepare(settings.pool, measured)
            await self.pool.prepare(settings.pool, dict(setup))
            # From here to the end nothing else happens in the event loop: one moment for everything.
            self._switch_processes()
        except BaseException:
            self.pool.refuse("it was refused")
            if measuring is not None:
                measuring.refuse("it was refused")
            raise
        try:
            for index in range(settings.pool.workers, self.settings.pool.workers):
                self.metrics.forget_worker(index)
            self.settings = settings
            for name, task in self.tasks.items():
                plan = plans[name] if plans is not None else BatchPlan(settings.tasks[name].batch)
                task.reload(settings, plan, self.pool.generation)
            self._inspector.reload()
        except Exception as error:
            failure = InternalError(error, where="a reload")
            self._on_fatal(failure)
            raise failure from error

    def _switch_processes(self) -> None:
        """The new processes take over. Raises ReloadRefusedError where some of them cannot; then none has."""
        if self.stopping:
            raise ReloadRefusedError("the processor is stopping")
        if self.measuring is not None and not self.measuring.prepared:
            raise ReloadRefusedError("its process that measures lengths has ended")
        self.pool.switch()
        if self.measuring is not None:
            self.measuring.switch()

    def kill(self) -> None:
        """End the workers at once, for an exit that does not wait."""
        self.pool.kill()
        if self.measuring is not None:
            self.measuring.kill()

    async def _close(self) -> None:
        """Commit, leave the groups, end the workers: side by side, since nothing is in flight any more."""
        stops = [*(task.stop() for task in self.tasks.values()), self.pool.stop()]
        if self.measuring is not None:
            stops.append(self.measuring.stop())
        closing = [asyncio.ensure_future(it) for it in stops]
        _, late = await asyncio.wait(closing, timeout=CLOSE_TIMEOUT_S)
        for it in closing:
            if it.done() and not it.cancelled() and (error := it.exception()) is not None:
                log.error("while stopping: %s: %s", type(error).__name__, error)
        if late:
            # Twice, since the first ends what is being waited for, and the second what its clean-up waits for.
            for _ in range(2):
                for it in late:
                    it.cancel()
                await asyncio.wait(late, timeout=CANCEL_GRACE_S)
            log.warning(
                "connections were not closed within %g s; Kafka will notice that they are gone", CLOSE_TIMEOUT_S
            )

    async def _drain(self) -> None:
        draining = asyncio.gather(*(task.drain() for task in self.tasks.values()))
        waiting: set[asyncio.Future[Any]] = {draining, self._ended}
        await asyncio.wait(waiting, timeout=self.settings.shutdown_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if draining.done():
            draining.result()
            return
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        if self._failure is None:
            log.warning(
                "%d records did not finish within shutdown_timeout_s (%g s); they are not committed and will be read "
                "again",
                sum(task.in_flight() for task in self.tasks.values()),
                self.settings.shutdown_timeout_s,
            )

    def _on_fatal(self, error: StreamprocError) -> None:
        if self._failure is None:
            self._failure = error
            if not self._ended.done():
                self._ended.set_result(None)

    # -- dispatch

    def _schedule(self) -> None:
        """Dispatch soon: once per turn of the loop, however many events ask for it."""
        if not self._dispatch_scheduled:
            self._dispatch_scheduled = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatch_scheduled = False
        if self._draining or self._failure is not None:
            return
        now = self.clock()
        try:
            while self.pool.room() and (batch := self._next_batch(now)) is not None:
                self.tasks[batch.task].dispatched(batch, now)
                self._fairness.dispatched(batch)
                self.pool.submit(batch)
            self._set_alarm()
            if self.measuring is not None:
                self.measuring.send({name for name, task in self.tasks.items() if task.circuit.is_open})
        except Exception as error:  # noqa: BLE001 - in a callback of the loop it would only be logged
            self._on_fatal(InternalError(error, where="the dispatch of batches"))

    def _next_batch(self, now: float) -> Batch | None:
        """Batches to be run again first; then, of the windows that may go, one by the tasks' shares and deadlines."""
        tasks = [task for task in self.tasks.values() if not task.circuit.is_open]
        for task in tasks:
            if (batch := task.take_again()) is not None:
                return batch
        lanes = [lane for task in tasks for lane in task.lanes_in_use]
        waiting = candidates(lanes, now + HANDOVER_S, idle=self.pool.idle() > 0)
        if not waiting:
            return None
        chosen = self._fairness.choose(waiting)
        return self._lanes[chosen.task].batcher.take(now, chosen.rule)

    def _set_alarm(self) -> None:
        """Wake at the next deadline; while no worker is free its answer wakes us, while results pile up their end."""
        deadlines = [
            deadline
            for task in self.tasks.values()
            if not task.circuit.is_open
            for lane in task.lanes_in_use
            if not lane.crowded and (deadline := lane.batcher.deadline) is not None
        ]
        self._alarm.set(min(deadlines) - HANDOVER_S if deadlines and self.pool.idle() else None)

    # -- answers

    def _on_reply(self, reply: Reply) -> None:
        self._fairness.ended(reply.batch, reply.wall_ms)
        self.tasks[reply.batch.task].replied(reply)

    def _on_failed(self, batch: Batch, failure: Failure, executed: bool, worker: int) -> None:
        self._fairness.ended(batch, None if executed else 0.0)
        self.tasks[batch.task].failed(batch, failure, executed, worker)

    def _on_restart(self, cause: Any) -> None:
        self.metrics.worker_restarted(cause)

    # -- what is seen from outside

    async def _tick(self) -> None:
        try:
            await self._tick_on()
        except Exception as error:  # noqa: BLE001 - without it nobody would notice a stall
            self._on_fatal(InternalError(error, where="the gauges"))

    async def _tick_on(self) -> None:
        for tick in itertools.count():
            self._inspector.observe(self.clock())
            self.pool.look_for_kills()
            for task in self.tasks.values():
                task.watch_connection()
                task.watch_circuit()
            if tick % ENDS_EVERY_TICKS == 0:
                for task in self.tasks.values():
                    if task.source.paused or task.source.held:
                        with contextlib.suppress(BrokerError):
                            await task.ask_for_ends()
            for worker in self.pool.workers():
                if worker.pid and worker.state != "ended":
                    try:
                        worker.rss_bytes = psutil.Process(worker.pid).memory_info().rss
                    except psutil.Error:
                        continue
                    self.metrics.set_worker_rss(worker.index, worker.rss_bytes)
            await asyncio.sleep(TICK_S)

    def live(self) -> Health:
        """Whether it makes progress."""
        return self._inspector.live(self.clock())

    def ready(self) -> Health:
        """Whether it can take work."""
        return self._inspector.ready()

    def status(self) -> ProcessorStatus:
        """Everything worth seeing."""
        return self._inspector.status(self.clock())

    def request(self, task: str) -> Request:
        """A place for a request. Raises TaskUnavailableError or RequestsFullError; KeyError where there is no task."""
        return self.tasks[task].request()

    def open_circuit(self, task: str) -> CircuitStatus | None:
        """Pause a task by hand; None where there is no such task."""
        if task not in self.tasks:
            return None
        self.tasks[task].open_circuit()
        return self._inspector.circuit(task, self.clock())

    def close_circuit(self, task: str) -> CircuitStatus | None:
        """Let a task go on; None where there is no such task."""
        if task not in self.tasks:
            return None
        self.tasks[task].close_circuit()
        return self._inspector.circuit(task, self.clock())

    @property
    def failure(self) -> StreamprocError | None:
        """What ended the processor, if something did."""
        return self._failure

    @property
    def stopping(self) -> bool:
        """Whether it is on its way out."""
        return self._stopped or self._failure is not None
