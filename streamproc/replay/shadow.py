"""Two processors on one stream at once: what they make of each record is compared as it comes.

Each has a broker of its own, in memory: the live topics are only read, without a consumer group, and nothing is written
or committed to Kafka. Records carry their place in the live topic in a header (``marks``), by which their results are
matched.

    chunks of records ─► in flight ─┬─► memory broker ─► baseline's processor ──► results ─┬─► comparison
                                    └─► memory broker ─► candidate's processor ─► results ─┘

Invariants:

- Reading waits while ``MAX_RECORDS`` records, or ``MAX_BYTES`` of values, are in flight: until both sides have told
  what became of them, for every task.
- Every record becomes a result or a dead letter on both sides: what the settings would drop, or stop for, is a dead
  letter here, and no circuit opens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from streamproc.broker.memory import MemoryBroker
from streamproc.errors import SettingsError, StreamprocError
from streamproc.records import TopicPartition, TopicRecord
from streamproc.replay.diff import BASELINE, CANDIDATE, SIDES, Comparison
from streamproc.replay.marks import Source, mark
from streamproc.runtime.batch_plan import batch_plans
from streamproc.runtime.processor import Processor
from streamproc.runtime.startup import declared_topics, worker_setup
from streamproc.settings import CauseSettings, Settings, TaskSettings

MAX_RECORDS = 20_000
MAX_BYTES = 64 << 20
PARTITIONS = 8
"""Of each topic in memory; a record's own partition chooses, so that the order within it is kept."""
COMMIT_INTERVAL_MS = 100
"""What is committed is let go of: the more often, the less is held."""
LOOK_S = 0.2
RUN = "shadow"

_NO_LIMIT = {"max.message.bytes": str(2**31 - 1)}


class ShadowError(StreamprocError):
    """One of the two processors ended. ``side`` says which."""

    def __init__(self, side: int, error: StreamprocError) -> None:
        self.side = side
        self.exit_code = error.exit_code
        super().__init__(f"the {SIDES[side]}: {error}")


@dataclass(slots=True)
class _InFlight:
    """A record that not all have answered for: the bytes of its value, and how many answers are still to come."""

    size: int
    left: int


class Shadow:
    """Runs both sides; an asynchronous context manager, used once.

    Args:
        baseline: The settings of the one side.
        candidate: Those of the other; the same tasks, with the same input topics.
        comparison: Takes in what comes out.

    Raises:
        SettingsError: the two have not the same tasks and input topics.
        ShadowError: on entering, one of the processors does not come up.
    """

    def __init__(self, baseline: Settings, candidate: Settings, comparison: Comparison) -> None:
        self._readers = _readers(baseline, candidate)
        self._comparison = comparison
        self._sides = (_Side(BASELINE, shadowed(baseline)), _Side(CANDIDATE, shadowed(candidate)))
        self._in_flight: dict[Source, _InFlight] = {}
        self._bytes = 0
        self._moved = asyncio.Event()
        self._pumping: asyncio.Task[None] | None = None
        self.fed = 0
        """Records that were given to both sides."""
        self.skipped = 0
        """Records of topics that no task reads."""

    async def __aenter__(self) -> Self:
        try:
            await _all(*(it.start() for it in self._sides))
        except BaseException:
            await self._stop()
            raise
        self._pumping = asyncio.get_running_loop().create_task(self._pump(), name="shadow")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    @property
    def topics(self) -> list[str]:
        """The input topics."""
        return list(self._readers)

    @property
    def in_flight(self) -> int:
        """Records that not all have answered for."""
        return len(self._in_flight)

    async def feed(self, chunks: AsyncIterator[Sequence[TopicRecord]], count: int | None = None) -> None:
        """Give records to both sides, as they take them, up to so many, or to the end.

        Raises:
            ShadowError: a processor has ended meanwhile.
        """
        await self._unless_it_ends(self._feed(chunks, count))

    async def drain(self, timeout_s: float) -> bool:
        """Wait until everything is compared, for at most so long; whether it is.

        Raises:
            ShadowError: a processor has ended meanwhile.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._unless_it_ends(self._until(lambda: not self._in_flight))
        return not self._in_flight

    async def _feed(self, chunks: AsyncIterator[Sequence[TopicRecord]], count: int | None) -> None:
        if count == 0:
            return
        async for chunk in chunks:
            for record in chunk:
                await self._until(lambda: len(self._in_flight) < MAX_RECORDS and self._bytes < MAX_BYTES)
                self._give(record)
                if self.fed == count:
                    return
            await asyncio.sleep(0)  # a file never waits, and the processors share this loop

    def _give(self, record: TopicRecord) -> None:
        # A capture may be of another topic than the settings read; where they read one, there is no doubt.
        topic = record.topic if len(self._readers) > 1 else self.topics[0]
        readers = self._readers.get(topic, 0)
        source = Source(record.topic, record.partition, record.offset)
        if not readers or source in self._in_flight:
            self.skipped += 1
            return
        size = len(record.value or b"")
        self._in_flight[source] = _InFlight(size, readers * len(self._sides))
        self._bytes += size
        self.fed += 1
        headers = mark(record.headers, RUN, source)
        for side in self._sides:
            side.broker.append(
                topic,
                record.value,
                key=record.key,
                partition=record.partition % PARTITIONS,
                headers=headers,
            )

    async def _pump(self) -> None:
        """Take what the sides have written, whenever something has changed."""
        while True:
            for side in self._sides:
                for record in side.take():
                    self._arrived(side.number, record)
            # Between the look and these futures nothing else runs, so no change is missed.
            changes = {side.broker.next_change() for side in self._sides}
            await asyncio.wait(changes, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)

    def _arrived(self, side: int, record: TopicRecord) -> None:
        result = self._comparison.add(side, record)
        it = None if result is None else self._in_flight.get(result.source)
        if result is None or it is None:
            return
        it.left -= 1
        if it.left == 0:
            del self._in_flight[result.source]
            self._bytes -= it.size
            self._moved.set()

    async def _until(self, condition: Any) -> None:
        while not condition():
            self._moved.clear()
            await self._moved.wait()

    async def _unless_it_ends(self, work: Any) -> None:
        """Do the work; raise at once what ends a processor, or the comparison, meanwhile."""
        if self._pumping is None:
            raise AssertionError("the shadow run has not begun")
        working = asyncio.ensure_future(work)
        ends = [asyncio.ensure_future(it.wait()) for it in self._sides]
        try:
            await asyncio.wait({working, self._pumping, *ends}, return_when=asyncio.FIRST_COMPLETED)
            for it in (*ends, self._pumping, working):
                if it.done():
                    it.result()
        finally:
            for it in (working, *ends):
                it.cancel()
            await asyncio.gather(working, *ends, return_exceptions=True)

    async def _stop(self) -> None:
        if self._pumping is not None:
            self._pumping.cancel()
            await asyncio.gather(self._pumping, return_exceptions=True)
        await _all(*(it.processor.stop() for it in self._sides))

    def kill(self) -> None:
        """End the workers at once, for an exit that does not wait."""
        for it in self._sides:
            it.processor.kill()


class _Side:
    """A processor with a broker of its own."""

    def __init__(self, number: int, settings: Settings) -> None:
        self.number = number
        self.broker = MemoryBroker()
        topics = [settings.topics_of(task) for task in settings.tasks]
        inputs = {name for it in topics for name in it.inputs}
        self._outputs = sorted({it.results for it in topics} | {it.dead for it in topics})
        self._metrics = sorted({it.metrics for it in topics})
        for name in {*inputs, *self._outputs, *self._metrics}:
            self.broker.create_topic(name, PARTITIONS, configs=_NO_LIMIT)
        self._inputs = {
            name: [settings.group_of(task) for task, it in settings.tasks.items() if name in it.input.topics]
            for name in inputs
        }
        self.processor = Processor(
            settings,
            worker_setup(settings, declared_topics(settings)),
            self.broker,
            plans=batch_plans(settings, os.environ),
        )

    async def start(self) -> None:
        """Bring the processor up. Raises ShadowError."""
        try:
            await self.processor.start()
            await self.processor.until_ready()
        except StreamprocError as error:
            raise ShadowError(self.number, error) from error

    async def wait(self) -> None:
        """Until the processor has ended. Raises ShadowError."""
        try:
            await self.processor.wait()
        except StreamprocError as error:
            raise ShadowError(self.number, error) from error

    def take(self) -> Iterator[TopicRecord]:
        """What the processor has written; it is let go of, and so is what it is done with."""
        for partition in (TopicPartition(topic, number) for topic in self._outputs for number in range(PARTITIONS)):
            log = self.broker.log(partition)
            if log.records:
                yield from list(log.records)
                log.truncate(log.end)
        for partition in (TopicPartition(topic, number) for topic in self._metrics for number in range(PARTITIONS)):
            self.broker.truncate(*partition, self.broker.log(partition).end)
        self._let_go()

    def _let_go(self) -> None:
        """Of input records that all tasks which read them have committed."""
        committed = {group: self.broker.committed(group) for groups in self._inputs.values() for group in groups}
        for topic, groups in self._inputs.items():
            for partition in (TopicPartition(topic, number) for number in range(PARTITIONS)):
                self.broker.truncate(*partition, min(committed[group].get(partition, 0) for group in groups))


async def _all(*work: Any) -> None:
    """Do all of it side by side to its end, whatever becomes of the rest; then raise what was raised first."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def _readers(baseline: Settings, candidate: Settings) -> dict[str, int]:
    """The input topics, and how many tasks read each. Raises SettingsError where the two differ in that."""
    both = [{name: tuple(sorted(task.input.topics)) for name, task in it.tasks.items()} for it in (baseline, candidate)]
    for name in sorted(both[0].keys() | both[1].keys()):
        if both[0].get(name) != both[1].get(name):
            before, after = (" and ".join(it.get(name, ())) or "nothing" for it in both)
            raise SettingsError(
                f"task {name} reads {before} in the baseline and {after} in the candidate",
                hint="a shadow run needs the same tasks with the same input topics on both sides",
            )
    topics = [topic for task in baseline.tasks.values() for topic in dict.fromkeys(task.input.topics)]
    return {topic: topics.count(topic) for topic in dict.fromkeys(topics)}


def shadowed(settings: Settings) -> Settings:
    """The settings as they run in the shadow: every record becomes something, and nothing is served."""
    tasks = {name: _shadowed(task) for name, task in settings.tasks.items()}
    return settings.model_copy(
        update={"tasks": tasks, "http": settings.http.model_copy(update={"enabled": False})},
    )


def _shadowed(task: TaskSettings) -> TaskSettings:
    causes = {
        name: getattr(task.on_error.causes, name).model_copy(update={"then": None})
        for name in CauseSettings.model_fields
    }
    on_error = task.on_error.model_copy(
        update={
            "then": "dead_letter",
            "causes": task.on_error.causes.model_copy(update=causes),
            "circuit": task.on_error.circuit.model_copy(update={"enabled": False}),
        }
    )
    return task.model_copy(
        update={
            "on_error": on_error,
            "commit_interval_ms": COMMIT_INTERVAL_MS,
            "input": task.input.model_copy(update={"auto_offset_reset": "earliest"}),
        }
    )
