"""A project's whole pipeline in memory: records in, results out, faults on demand.

It is the processor that ``streamproc run`` starts, with the backend in worker processes; in the place of Kafka is a
``MemoryBroker``, and offsets are committed after 10 ms rather than a second.

For tests without an event loop: it has one of its own, which runs while a method of the pipeline does, and stands still
in between. So nothing happens behind a test's back, and every method has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import orjson

from streamproc.broker.interface import Headers
from streamproc.broker.memory import MemoryBroker
from streamproc.broker.memory_log import MemoryRecord
from streamproc.errors import BrokerError, StreamprocError, TransactionAbortedError
from streamproc.observe.status import ProcessorStatus
from streamproc.records import TopicPartition, TopicRecord
from streamproc.replay.dead_letters import Letter, read_letter
from streamproc.replay.marks import RUN, SOURCE, Source, without
from streamproc.replay.results import Result, read
from streamproc.runtime.batch_plan import batch_plans
from streamproc.runtime.processor import Processor
from streamproc.runtime.startup import declared_topics, worker_setup
from streamproc.settings import Settings
from streamproc.settings_loading import load_settings
from streamproc.testing.topics import create_topics

DEADLINE_S = 60.0
COMMIT_INTERVAL_MS = 10
METRICS_GRACE_S = 2.0
"""Metrics records hold up no offset; they are waited for, and where they were refused given up."""
_POLL_S = 0.05

T = TypeVar("T")


class NotInTimeError(AssertionError):
    """What a test waited for did not come before its deadline."""


class UsageError(StreamprocError):
    """A pipeline is asked for something that it cannot do."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What came of some records: results and dead letters in the order of the records, then of the tasks' names."""

    sent: Sequence[MemoryRecord]
    results: Sequence[Result]
    dead_letters: Sequence[Letter]
    metrics: Sequence[Mapping[str, Any]]
    """The metrics records of the batches."""

    @property
    def values(self) -> list[Any]:
        """The results' values: what the backend returned."""
        return [result.value for result in self.results]


class Pipeline:
    """A running pipeline; a context manager.

    Args:
        settings: What to run: settings, or their file.
        environ: Variables over the file, ``{"STREAMPROC_TASKS__TEXT__BATCH__MAX_SIZE": "8"}``; not the process's own.
        deadline_s: How long anything may take, where a method is not told otherwise.
        wall_clock: Seconds since 1970, for timestamps.

    Raises:
        StreamprocError: on entering, what keeps the processor from starting; from every method, what has ended it.
        NotInTimeError: from every method that waits.
    """

    def __init__(
        self,
        settings: Settings | str | os.PathLike[str] = "streamproc.yaml",
        *,
        environ: Mapping[str, str] | None = None,
        deadline_s: float = DEADLINE_S,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if not isinstance(settings, Settings):
            settings = load_settings(Path(settings), environ or {})
        elif environ:
            raise UsageError("environ goes over a settings file; give the file's name in place of the settings")
        self.settings = _committing_soon(settings)
        self.broker = MemoryBroker(clock=wall_clock)
        self._deadline_s = deadline_s
        self._wall_clock = wall_clock
        self._runner: asyncio.Runner | None = None
        self._processor: Processor | None = None
        self._turn = 0

    def __enter__(self) -> Self:
        self._runner = asyncio.Runner()
        try:
            self._run(create_topics(self.settings, self.broker.admin()))
            self._run(self._start())
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the processor as SIGTERM does, and end the loop; what was written can still be read."""
        if self._runner is not None:
            try:
                self._run(self._stop())
            finally:
                self._runner.close()
                self._runner = None

    def restart(self) -> None:
        """Stop the processor, and start another one over the same topics and committed offsets."""
        self._run(self._stop())
        self._run(self._start())

    # -- records in

    def send(
        self,
        records: Iterable[Any],
        *,
        topic: str | None = None,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> list[MemoryRecord]:
        """Write records to an input topic, and return them as they are there; nothing is processed yet.

        Args:
            records: dicts (or anything else with a JSON form), bytes as they are, None; or records with key, value,
                headers and timestamp of their own, such as those of ``read_capture``.
            topic: Where there are several input topics.
            key: The field to take the key from.
            partition: Where all of them go; else by key, or those without one to each partition in turn.
            headers: Of all of them.
        """
        to = topic or self._only_topic()
        count = self.broker.partitions_of(to)
        sent = []
        for record in records:
            own: TopicRecord | None = record if hasattr(record, "offset") else None
            found = own.key if own is not None else _key(record, key)
            at = partition
            if at is None and found is not None:
                at = self.broker.partition_of_key(found, count)
            elif at is None:
                at, self._turn = self._turn % count, self._turn + 1
            sent.append(
                self.broker.append(
                    to,
                    own.value if own is not None else _value(record),
                    key=found,
                    partition=at,
                    headers=[*(own.headers if own is not None else ()), *headers],
                    timestamp=None if own is None else own.timestamp,
                )
            )
        return sent

    def process(
        self,
        records: Iterable[Any],
        *,
        topic: str | None = None,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
        deadline_s: float | None = None,
    ) -> Outputs:
        """Send records, wait until all is settled, and return what came of them; arguments as those of ``send``."""
        before = {
            partition: self.broker.log(partition).end
            for role in ("results", "dead", "metrics")
            for topic in self._topics(role)
            for partition in self._partitions(topic)
        }
        sent = self.send(records, topic=topic, key=key, partition=partition, headers=headers)
        self.settle(deadline_s)
        return self._outputs(sent, before)

    def settle(self, deadline_s: float | None = None) -> None:
        """Wait until every record of the input topics is a result, a dead letter or dropped, and is committed."""
        self.until(self._is_settled, "every record is settled and committed", deadline_s)
        with contextlib.suppress(NotInTimeError):
            self.until(self._metrics_are_there, "the metrics records are written", METRICS_GRACE_S)

    def until(self, condition: Callable[[], object], what: str, deadline_s: float | None = None) -> None:
        """Let the pipeline run until a condition holds; ``what`` says which, for the error."""
        self._run(self._until(condition, what, self._deadline_s if deadline_s is None else deadline_s))

    # -- what came of them

    def outputs(self) -> Outputs:
        """What came of all records so far."""
        sent = [record for topic in self._inputs() for record in self.broker.records(topic)]
        return self._outputs(sent, {})

    def offsets(self, task: str | None = None) -> dict[TopicPartition, int]:
        """The committed offsets of a task; it may be left out where there is one."""
        return self.broker.committed(self.settings.group_of(self._task(task)))

    def status(self) -> ProcessorStatus:
        """What ``/status`` says."""
        return self._running.status()

    # -- faults

    def kill_worker(self, index: int = 0) -> None:
        """Kill a worker process, as the kernel does, and come back when it is seen to be gone."""
        worker = self._running.pool.workers()[index]
        pid = worker.pid
        if pid is None:
            raise UsageError(f"worker {index} has no process now")
        os.kill(pid, signal.SIGKILL)
        self.until(lambda: self._running.pool.workers()[index].pid != pid, f"worker {index} is gone")

    def refuse_writes(self, times: int = 1) -> None:
        """The broker refuses the next batches that are written: the end of the processor, or of a transaction."""
        delivery = {task.delivery for task in self.settings.tasks.values()}
        error = TransactionAbortedError if delivery == {"exactly_once"} else BrokerError
        self.broker.fail_next("write", error("refused by the test"), times)

    def refuse_commits(self, times: int = 1) -> None:
        """The broker refuses the next commits of offsets, or of transactions."""
        self.broker.fail_next("commit", BrokerError("refused by the test"), times)
        self.broker.fail_next("commit_transaction", TransactionAbortedError("refused by the test"), times)

    @contextlib.contextmanager
    def acknowledgements_held(self) -> Iterator[None]:
        """Within the block the broker acknowledges nothing that is written; afterwards all of it, in order."""
        held = self.broker.acknowledgements_held()
        held.__enter__()
        try:
            yield
        finally:
            self._run(_leave(held))

    def move_partitions(self, task: str | None = None) -> None:
        """Take a task's partitions away for another member of its group, and give them back when that leaves."""
        name = self._task(task)
        self._run(self._move(self.settings.group_of(name), self.settings.topics_of(name).inputs))

    # -- within

    @property
    def _running(self) -> Processor:
        if self._processor is None:
            raise UsageError("the pipeline does not run; use it as a context manager")
        return self._processor

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._runner is None:
            work.close()
            raise UsageError("the pipeline does not run; use it as a context manager")
        return self._runner.run(work)

    async def _start(self) -> None:
        self._processor = Processor(
            self.settings,
            worker_setup(self.settings, declared_topics(self.settings)),
            self.broker,
            plans=batch_plans(self.settings, os.environ),
            wall_clock=self._wall_clock,
        )
        processor = self._processor
        async with _deadline(self._deadline_s, "the workers are ready"):
            await processor.start()
            await processor.until_ready()

    async def _stop(self) -> None:
        processor, self._processor = self._processor, None
        if processor is not None:
            await processor.stop()

    async def _until(self, condition: Callable[[], object], what: str, deadline_s: float) -> None:
        ends = time.monotonic() + deadline_s
        while not condition():
            if self._running.failure is not None:
                raise self._running.failure
            if time.monotonic() > ends:
                raise NotInTimeError(f"after {deadline_s:g} s still not: {what}; {self._where_it_stands()}")
            await asyncio.wait([self.broker.next_change()], timeout=_POLL_S)

    async def _move(self, group: str, topics: Sequence[str]) -> None:
        async with _deadline(self._deadline_s, "the partitions have moved and come back"):
            other = self.broker.consumer(group_id=group)
            await other.start(topics, _nothing, _nothing)
            await self.broker.settled()
            await other.stop()
            await self.broker.settled()

    def _is_settled(self) -> bool:
        for name in self.settings.tasks:
            committed = self.broker.committed(self.settings.group_of(name))
            for topic in self.settings.topics_of(name).inputs:
                if any(committed.get(it, 0) < self.broker.log(it).end for it in self._partitions(topic)):
                    return False
        return True

    def _metrics_are_there(self) -> bool:
        told: int = sum(orjson.loads(it.value or b"")["records"] for it in self._since({}, "metrics"))
        return told >= sum(task.counts.results + task.counts.dead for task in self._running.tasks.values())

    def _where_it_stands(self) -> str:
        parts = []
        for name, task in self._running.tasks.items():
            counts = task.counts
            state = "its circuit is open, " if task.circuit.is_open else ""
            parts.append(
                f"task {name}: {state}{counts.taken} records taken, {counts.results} results, {counts.dead} dead "
                f"letters, {counts.dropped} dropped"
            )
        return "; ".join(parts)

    def _topics(self, role: str) -> list[str]:
        """The tasks' topics of a role (``results``, ``metrics``, ``dead``), each once."""
        return list(dict.fromkeys(getattr(self.settings.topics_of(name), role) for name in self.settings.tasks))

    def _inputs(self) -> list[str]:
        return list(dict.fromkeys(it for task in self.settings.tasks.values() for it in task.input.topics))

    def _partitions(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, number) for number in range(self.broker.partitions_of(topic))]

    def _only_topic(self) -> str:
        topics = self._inputs()
        if len(topics) > 1:
            raise UsageError(f"say to which topic: {', '.join(topics)}")
        return topics[0]

    def _task(self, task: str | None) -> str:
        names = list(self.settings.tasks)
        if task is None and len(names) == 1:
            return names[0]
        if task not in names:
            problem = "say which task" if task is None else f"there is no task {task}"
            raise UsageError(f"{problem}; the tasks are: {', '.join(names)}")
        return task

    def _since(self, before: Mapping[TopicPartition, int], role: str) -> Iterator[MemoryRecord]:
        """What was written to the topics of a role, from these offsets on."""
        for topic in self._topics(role):
            for partition in self._partitions(topic):
                log = self.broker.log(partition)
                yield from log.read(before.get(partition, 0), log.end)

    def _outputs(self, sent: Sequence[MemoryRecord], before: Mapping[TopicPartition, int]) -> Outputs:
        order = {Source(it.topic, it.partition, it.offset): number for number, it in enumerate(sent)}
        # The marks of a replay, which records of a capture may bring along, tell of another source than the one here.
        unmarked = [
            replace(it, headers=tuple(without(it.headers, (RUN, SOURCE)))) for it in self._since(before, "results")
        ]
        results = [result for it in unmarked if (result := read(it)) is not None and result.source in order]
        letters = [
            letter
            for it in self._since(before, "dead")
            if (letter := read_letter(it)) is not None and letter.source in order
        ]
        return Outputs(
            sent,
            sorted(results, key=lambda it: (order[it.source], it.task)),
            sorted(letters, key=lambda it: (order[it.source], it.task)),
            [orjson.loads(it.value or b"") for it in self._since(before, "metrics")],
        )


def _committing_soon(settings: Settings) -> Settings:
    """The settings, but that a test does not wait a second for its offsets."""
    tasks = {
        name: task.model_copy(update={"commit_interval_ms": COMMIT_INTERVAL_MS})
        for name, task in settings.tasks.items()
    }
    return settings.model_copy(update={"tasks": tasks})


def _key(record: Any, field: str | None) -> bytes | None:
    if field is None:
        return None
    if not isinstance(record, dict) or field not in record:
        raise UsageError(f"a record has no field {field!r} to take the key from")
    found = record[field]
    return found.encode() if isinstance(found, str) else orjson.dumps(found)


def _value(record: Any) -> bytes | None:
    return record if record is None or isinstance(record, bytes) else orjson.dumps(record)


async def _leave(held: contextlib.AbstractContextManager[None]) -> None:
    """Leave it within the loop, in which what was held goes on."""
    held.__exit__(None, None, None)


async def _nothing(_: set[TopicPartition]) -> None:
    """A member that has nothing to give up."""


@contextlib.asynccontextmanager
async def _deadline(seconds: float, what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise NotInTimeError(f"after {seconds:g} s still not: {what}") from error
