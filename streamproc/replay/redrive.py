"""Sends dead letters back to the topics that their records came from, each of a selection once.

Progress is kept as committed offsets of a consumer group without members: what is before them is done for this
selection, sent or passed by. Letters go in chunks, one transaction each:

    begin an epoch of the transactional id   ends what a redrive that was killed has left open, and fences one that runs
    read the committed offsets               so they are final, and nobody else moves them
    read a chunk, write its records          into their input topics
    commit records and offsets               both or neither, wherever it is interrupted

Where a transaction cannot go on it is given up, and the committed offsets are read again: they say what was done.
Against a broker without transactions the chunk's records are acknowledged first and the offsets committed then: who is
killed in between sends that chunk twice.

Invariants:

- A letter is either unselected, sent, or skipped for a reason that is counted; what is skipped is not read again.
- Letters of a partition are written in their order, and those of one input partition go to one partition.
- What comes into the dead-letter topic after the beginning is left for the next time, or letters whose records fail
  again would be sent in circles; how often a record may be sent back is bounded by a count in its headers, besides.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from streamproc.broker.interface import (
    Admin,
    BatchBuilder,
    Membership,
    Producer,
    Reader,
    Row,
    TopicInfo,
    TransactionalProducer,
)
from streamproc.broker.partitioner import partition_of_key
from streamproc.broker.read_between import read_between
from streamproc.errors import RecordTooLargeError, TopicMissingError, TransactionAbortedError
from streamproc.records import TopicPartition, TopicRecord
from streamproc.replay import marks
from streamproc.replay.dead_letters import Letter, Selection, digest, read_letter

CHUNK_RECORDS = 500
"""Letters in one transaction: what comes twice, at most, where there are none."""
MAX_REPLAYS = 3
MAX_EXAMPLES = 5
ATTEMPTS = 3
"""How many transactions in a row may be given up before the redrive is."""
_RATE_STEP_S = 0.25
_LAST_CHUNK_S = 15.0
"""A chunk that is being written is finished when the redrive is interrupted, for so long."""


class Skip(StrEnum):
    """Why a selected letter is not sent. The values are public."""

    REPLAYED = "replayed_too_often"
    CUT = "cut"
    FOREIGN = "no_dead_letter"
    TOO_LARGE = "too_large"


@dataclass(frozen=True, slots=True)
class Options:
    """What is sent, and how; ``rate`` is records a second."""

    selection: Selection = field(default_factory=Selection)
    limit: int | None = None
    rate: float | None = None
    max_replays: int = MAX_REPLAYS
    keep_timestamps: bool = True


@dataclass(slots=True)
class Outcome:
    """What became of the letters that were looked at."""

    sent: Counter[TopicPartition] = field(default_factory=Counter)
    """By the partition that they went to, or would go to."""
    skipped: Counter[Skip] = field(default_factory=Counter)
    examples: defaultdict[Skip, list[marks.Source]] = field(default_factory=lambda: defaultdict(list))
    passed: int = 0
    """Letters that are not selected."""
    oldest_ms: dict[str, int] = field(default_factory=dict)
    """The timestamp of the oldest record for each topic."""

    def __iadd__(self, other: Outcome) -> Self:
        self.sent += other.sent
        self.skipped += other.skipped
        self.passed += other.passed
        for topic, at in other.oldest_ms.items():
            self.oldest_ms[topic] = min(at, self.oldest_ms.get(topic, at))
        for reason, places in other.examples.items():
            self.examples[reason] = [*self.examples[reason], *places][:MAX_EXAMPLES]
        return self

    def skip(self, reason: Skip, record: TopicRecord) -> None:
        """One more that is not sent."""
        self.skipped[reason] += 1
        if len(self.examples[reason]) < MAX_EXAMPLES:
            self.examples[reason].append(marks.Source(record.topic, record.partition, record.offset))


@dataclass(slots=True)
class _Chunk:
    """Letters that are sent together, and the offsets behind them and behind those that are not sent."""

    letters: dict[TopicPartition, list[Letter]] = field(default_factory=lambda: defaultdict(list))
    offsets: dict[TopicPartition, int] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=Outcome)


def group_of(application: str, topic: str, selection: Selection, begin: str) -> str:
    """The consumer group in which a selection keeps its progress: one for everything, another for each other one.

    Two redrives go on from each other when they mean the same letters, so ``begin`` counts as it was said (``2h``), and
    where to end, how many and how fast do not count.
    """
    said = selection.described() | ({} if begin == "beginning" else {"from": begin})
    name = f"{application}.{topic}.redrive"
    return f"{name}.{digest(repr(said))}" if said else name


class Redrive:
    """One redrive of a dead-letter topic. What it did so far is in ``outcome``, also when it is interrupted.

    Args:
        admin: Looks at the topics and the group, and commits where there are no transactions.
        reader: Reads the dead letters.
        begins: Where to begin in each partition of the dead-letter topic, unless the group has come further.
        ends: Where to end in each: at their ends of now, or before.
        group: Where the progress is kept.
        options: What is sent, and how.
        producer: Writes the records, where there are no transactions.
        transactions: Writes the records, where there are; with neither it is a dry run. Either is started already: of
            two redrives with one transactional id, the one that started last goes on.
        on_sent: Told how many more were sent.
        clock: A clock that does not go back, in seconds.
    """

    def __init__(
        self,
        admin: Admin,
        reader: Reader,
        *,
        begins: Mapping[TopicPartition, int],
        ends: Mapping[TopicPartition, int],
        group: str,
        options: Options,
        producer: Producer | None = None,
        transactions: TransactionalProducer | None = None,
        on_sent: Callable[[int], object] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.outcome = Outcome()
        self._admin = admin
        self._reader = reader
        self._begins = begins
        self._ends = ends
        self._group = group
        self._options = options
        self._producer = transactions or producer
        self._transactions = transactions
        self._on_sent = on_sent
        self._clock = clock
        self._topics: Mapping[str, TopicInfo] = {}
        self._limits: dict[str, int | None] = {}
        self._log_ends: Mapping[TopicPartition, int] = {}
        self._found: AsyncIterator[Mapping[TopicPartition, Sequence[TopicRecord]]]
        rate = options.rate
        self._chunk_records = CHUNK_RECORDS if rate is None else min(CHUNK_RECORDS, max(1, int(rate * _RATE_STEP_S)))

    async def run(self) -> Outcome:
        """Send the selected letters back, from where the last redrive of this group stopped.

        Raises:
            TopicMissingError: the input topic of a selected letter does not exist.
            BrokerError: Kafka refused, or did not answer; what is in ``outcome`` was sent all the same.
        """
        self._topics = await self._admin.topics()
        self._log_ends = await self._admin.end_offsets(list(self._ends))
        await self._go_to_committed()
        try:
            await self._send()
        except TopicMissingError as error:
            with contextlib.suppress(TopicMissingError):
                await self._admin.check_topics(error.topics, "Write")  # it may only be hidden from us
            raise
        return self.outcome

    async def _send(self) -> None:
        begun, given_up = self._clock(), 0
        while (chunk := await self._next()) is not None:
            if self._producer is None:
                self._done(chunk)
                continue
            try:
                await _uninterrupted(self._deliver(self._producer, chunk))
            except TransactionAbortedError:
                given_up += 1
                if given_up == ATTEMPTS:
                    raise
                await self._recover(chunk)
            else:
                given_up = 0
            if self._options.rate is not None:
                due = begun + self.outcome.sent.total() / self._options.rate
                await asyncio.sleep(max(0.0, due - self._clock()))

    # -- reading

    async def _go_to_committed(self) -> Mapping[TopicPartition, int]:
        """Read on from the committed offsets, and say which they are."""
        found = await self._admin.committed(self._group, list(self._ends), stable=self._producer is not None)
        # An offset beyond the end is that of an earlier topic of this name.
        committed = {it: offset for it, offset in found.items() if offset <= self._log_ends[it]}
        positions = {it: max(begin, committed.get(it, begin)) for it, begin in self._begins.items()}
        self._found = read_between(self._reader, positions, self._ends, self._chunk_records)
        return committed

    async def _next(self) -> _Chunk | None:
        """The next letters; None at the end, or at the limit."""
        left = None if self._options.limit is None else self._options.limit - self.outcome.sent.total()
        if left == 0 or (found := await anext(self._found, None)) is None:
            return None
        chunk = _Chunk()
        for partition, records in found.items():
            for record in records:
                if chunk.outcome.sent.total() == left:
                    return chunk
                chunk.offsets[partition] = record.offset + 1
                self._decide(record, chunk)
        return chunk

    def _decide(self, record: TopicRecord, chunk: _Chunk) -> None:
        """Put a record where it belongs: to those that are sent, skipped or passed by."""
        letter, selection = read_letter(record), self._options.selection
        if letter is None and selection == Selection():
            chunk.outcome.skip(Skip.FOREIGN, record)
        elif letter is None or letter not in selection:
            chunk.outcome.passed += 1
        elif letter.cut:
            chunk.outcome.skip(Skip.CUT, record)
        elif letter.replays >= self._options.max_replays:
            chunk.outcome.skip(Skip.REPLAYED, record)
        else:
            to = self._target(letter)
            chunk.letters[to].append(letter)
            chunk.outcome.sent[to] += 1
            at = record.timestamp
            chunk.outcome.oldest_ms[to.topic] = min(at, chunk.outcome.oldest_ms.get(to.topic, at))

    def _target(self, letter: Letter) -> TopicPartition:
        """The partition that the record came from; where it is gone, that of its key, or one for all of its kin."""
        topic, partition, _ = letter.source
        count = self._partitions_of(topic, letter)
        if partition >= count:
            key = letter.record.key
            partition = partition % count if key is None else partition_of_key(key, count)
        return TopicPartition(topic, partition)

    def _partitions_of(self, topic: str, letter: Letter) -> int:
        if topic not in self._topics:
            at = letter.place
            raise TopicMissingError(
                f"input topic {topic} does not exist, which the dead letter {at.topic}:{at.partition}:{at.offset} came "
                f"from; create it with `streamproc topics apply`, or choose other letters with --task or --from",
                topics=[topic],
            )
        return self._topics[topic].partitions

    # -- writing

    async def _deliver(self, producer: Producer, chunk: _Chunk) -> None:
        """Write a chunk and commit its offsets."""
        sent: list[tuple[TopicPartition, list[Letter], asyncio.Future[object]]] = []
        try:
            for to, letters in chunk.letters.items():
                for batch, inside in await self._batches(producer, to.topic, letters):
                    sent.append((to, inside, await producer.send_batch(batch, *to)))
        finally:
            answers = await asyncio.gather(*[answer for _, _, answer in sent], return_exceptions=True)
        for (to, letters, _), answer in zip(sent, answers, strict=True):
            if isinstance(answer, RecordTooLargeError) and len(letters) == 1:
                chunk.outcome.sent[to] -= 1
                chunk.outcome.skip(Skip.TOO_LARGE, letters[0].record)
            elif isinstance(answer, BaseException):
                raise answer
        if self._transactions is not None:
            await self._transactions.commit_transaction(chunk.offsets, Membership.none(self._group))
        else:
            await self._admin.commit(self._group, chunk.offsets)
        self._done(chunk)

    async def _batches(
        self, producer: Producer, topic: str, letters: list[Letter]
    ) -> list[tuple[BatchBuilder, list[Letter]]]:
        """Batches of at most what the topic takes: a record that it does not take is in one of its own."""
        if topic not in self._limits:
            self._limits[topic] = await producer.max_message_bytes(topic)
        rows = [self._row(letter) for letter in letters]
        batches, first = [], 0
        while first < len(rows):
            batch = producer.create_batch(self._limits[topic])
            count = batch.extend(rows, first)
            batches.append((batch, letters[first : first + count]))
            first += count
        return batches

    def _row(self, letter: Letter) -> Row:
        record = letter.record
        headers = marks.counted(letter.headers, letter.replays + 1)
        return (record.timestamp if self._options.keep_timestamps else None, record.key, record.value, headers)

    async def _recover(self, chunk: _Chunk) -> None:
        """Go on from what is committed after a transaction was given up, whose commit may have gone through."""
        if self._transactions is None:
            raise AssertionError("a transaction was given up where there is none")
        await self._transactions.abort()
        committed = await self._go_to_committed()
        if all(committed.get(it) == offset for it, offset in chunk.offsets.items()):
            self._done(chunk)

    def _done(self, chunk: _Chunk) -> None:
        self.outcome += chunk.outcome
        self._on_sent(chunk.outcome.sent.total())


async def _uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Do the work; to its end, within bounds, also when we are told to stop meanwhile."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working}, timeout=_LAST_CHUNK_S)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        raise
