"""What has to be true of a task's topics after a run, whatever was broken meanwhile. No I/O.

It is given every record of the input, result and dead-letter topics in the order of their partitions, and the committed
offsets as they were seen, and says what is not as it was promised. It counts everything, and remembers the first few of
each kind, with the places to look at.

A *delivery* is a result or a dead letter; the first one of a record counts, further ones are duplicates. Times are the
brokers' (milliseconds since 1970, LogAppendTime), which on one machine is one clock.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import orjson

from tests.chaos.records import Fate, answer_to, broken_number, fate_of

MAX_EXAMPLES = 5
CLOCK_MS = 50
"""Allowed between the clock readings of two processes on one machine."""
NEVER = -1
Header = tuple[str, bytes | None]


@dataclass(slots=True)
class Finding:
    """A promise that was broken: how often, and the first few cases."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str, count: int = 1) -> None:
        self.count += count
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)


class Findings(dict[str, Finding]):
    """Findings by what they are; only those that there are."""

    def add(self, what: str, example: str, count: int = 1) -> None:
        self.setdefault(what, Finding()).add(example, count)


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A delivery after the first."""

    at_ms: int
    partition: int
    offset: int
    where: str
    first_at_ms: int


class TaskOracle:
    """Compares the topics of one task."""

    def __init__(self, task: str, partitions: int) -> None:
        self.task = task
        self.findings = Findings()
        self.duplicates: list[Duplicate] = []
        self.results = self.dead_letters = 0
        self._numbers = [array("q") for _ in range(partitions)]
        self._first_at = [array("q") for _ in range(partitions)]
        self._last_first = {"results": [-1] * partitions, "dead letters": [-1] * partitions}
        self._result_times = [array("q") for _ in range(partitions)]

    # -- what there is

    def input(self, partition: int, offset: int, value: bytes) -> None:
        """A record of the input topic; they come first."""
        numbers = self._numbers[partition]
        where = f"{self.task} input {partition}@{offset}"
        if offset != len(numbers):
            self.findings.add("input with holes", where, offset - len(numbers))
            while len(numbers) < offset:
                numbers.append(NEVER)
                self._first_at[partition].append(NEVER)
        number = _number_of(value)
        if number is None or number[0] != partition:
            self.findings.add("input of somebody else", f"{where}: {value[:80]!r}")
        numbers.append(NEVER if number is None else number[1])
        self._first_at[partition].append(NEVER)

    def result(self, partition: int, offset: int, at_ms: int, value: bytes) -> None:
        """A record of the result topic."""
        self.results += 1
        where = f"{self.task} results {partition}@{offset}"
        try:
            told = orjson.loads(value)
            source, result = told["source"], told["result"]
            of, at = source["partition"], source["offset"]
            number, answer = result["number"], result["answer"]
        except (ValueError, KeyError, TypeError):
            self.findings.add("wrong content", f"{where}: {value[:200]!r}")
            return
        expected = self._delivered("results", of, at, at_ms, where)
        if expected is None:
            return
        self._result_times[of].append(at_ms)
        if (
            number != expected
            or answer != answer_to(of, expected)
            or partition != of
            or fate_of(expected) != Fate.RESULT
            or told["task"] != self.task
        ):
            self.findings.add("wrong content", f"{where}, of input {of}@{at} (number {expected}): {value[:200]!r}")

    def dead(self, partition: int, offset: int, at_ms: int, value: bytes | None, headers: Sequence[Header]) -> None:
        """A record of the dead-letter topic."""
        self.dead_letters += 1
        where = f"{self.task} dead letters {partition}@{offset}"
        told = dict(headers)
        try:
            of = int(told["streamproc-source-partition"] or b"")
            at = int(told["streamproc-source-offset"] or b"")
        except (ValueError, KeyError):
            self.findings.add("wrong content", f"{where}: {told}")
            return
        expected = self._delivered("dead letters", of, at, at_ms, where)
        if expected is None:
            return
        fate = fate_of(expected)
        why = f"{told.get('streamproc-error-type')!r}: {told.get('streamproc-error-message')!r}"
        if fate == Fate.RESULT:
            self.findings.add("good records given up", f"{where}, of input {of}@{at} (number {expected}): {why}")
        elif (
            partition != of
            or _number_of(value or b"") != (of, expected)
            or told.get("streamproc-stage") != (b"decode" if fate == Fate.BROKEN else b"execute")
        ):
            self.findings.add("wrong content", f"{where}, of input {of}@{at} (number {expected}): {why}, {value!r}")

    def _delivered(self, output: str, partition: int, offset: int, at_ms: int, where: str) -> int | None:
        """Enter a delivery; the number of its record, or None where there is no such record."""
        if not 0 <= partition < len(self._numbers) or not 0 <= offset < len(self._numbers[partition]):
            self.findings.add("never produced", f"{where}, of input {partition}@{offset}")
            return None
        first_at = self._first_at[partition]
        if first_at[offset] == NEVER:
            first_at[offset] = at_ms
            last = self._last_first[output][partition]
            if offset < last:
                self.findings.add("out of order", f"{where}: input {partition}@{offset} came first after @{last}")
            self._last_first[output][partition] = max(offset, last)
        else:
            earlier, later = sorted((first_at[offset], at_ms))
            self.duplicates.append(Duplicate(later, partition, offset, where, earlier))
            first_at[offset] = earlier
        return self._numbers[partition][offset]

    # -- what follows from it

    @property
    def records(self) -> int:
        """How many records the input topic has."""
        return sum(len(numbers) for numbers in self._numbers)

    def check_input(self, acknowledged: Sequence[int]) -> None:
        """Everything that the cluster acknowledged to the load is in the input topic, once and in order."""
        for partition, (numbers, count) in enumerate(zip(self._numbers, acknowledged, strict=True)):
            where = f"{self.task} input {partition}"
            if len(numbers) < count:
                self.findings.add("input lost by the cluster", f"{where}: {count} acknowledged", count - len(numbers))
            for offset, number in enumerate(numbers):
                if number != offset:
                    self.findings.add("input out of order", f"{where}@{offset} has number {number}")
                    break

    def check_deliveries(self, *, exactly_once: bool) -> None:
        """Every record was delivered; with ``exactly_once`` none twice."""
        for partition, first_at in enumerate(self._first_at):
            for offset, at_ms in enumerate(first_at):
                if at_ms == NEVER and self._numbers[partition][offset] != NEVER:
                    number = self._numbers[partition][offset]
                    self.findings.add("lost", f"{self.task} input {partition}@{offset} (number {number})")
        if exactly_once:
            for duplicate in self.duplicates:
                self.findings.add("delivered twice", describe(self.task, duplicate))

    def check_commits(self, seen: Iterable[tuple[int, int, int]], final: Mapping[int, int]) -> None:
        """No commit ran ahead of the deliveries or went back, and all is committed at the end.

        ``seen`` are times, partitions and offsets, each read from the group after the time before and not after this
        one; ``final`` are the offsets by partition at the end.
        """
        all_before = [array("q", accumulate(first_at, max, initial=0)) for first_at in self._first_at]
        missing = [_first_missing(first_at) for first_at in self._first_at]
        last: dict[int, int] = {}
        for at_ms, partition, offset in seen:
            where = f"{self.task} input {partition}: {offset} committed at {at_ms}"
            if offset < last.get(partition, 0):
                self.findings.add("commits that went back", f"{where}, {last[partition]} before")
            last[partition] = offset
            if offset >= len(all_before[partition]):
                self.findings.add("committed beyond the end", where)
            elif offset > missing[partition]:
                self.findings.add("committed before it was delivered", f"{where}, @{missing[partition]} never was")
            elif all_before[partition][offset] > at_ms + CLOCK_MS:
                self.findings.add("committed before it was delivered", f"{where}, {all_before[partition][offset]} due")
        for partition, numbers in enumerate(self._numbers):
            if final.get(partition, 0) != len(numbers):
                where = f"{self.task} input {partition}: {final.get(partition, 0)} committed of {len(numbers)}"
                self.findings.add("not committed at the end", where)

    def delivery_times(self) -> list[int]:
        """When each record was delivered first, in milliseconds since 1970, in the order of time."""
        return sorted(at_ms for first_at in self._first_at for at_ms in first_at if at_ms != NEVER)

    def longest_stall_s(self) -> tuple[float, float]:
        """The longest time without any result, and without one of a partition that has results."""
        merged = sorted(at_ms for times in self._result_times for at_ms in times)
        return _longest_gap_ms(merged) / 1_000, max(
            (_longest_gap_ms(times) for times in self._result_times), default=0
        ) / 1_000


def _number_of(value: bytes) -> tuple[int, int] | None:
    try:
        told = orjson.loads(value)
    except ValueError:
        return broken_number(value)
    try:
        return told["partition"], told["number"]
    except (KeyError, TypeError):
        return None


def describe(task: str, it: Duplicate) -> str:
    """A duplicate for people."""
    return f"{it.where}: input {task} {it.partition}@{it.offset} again, {it.at_ms - it.first_at_ms} ms later"


def _first_missing(first_at: Sequence[int]) -> int:
    """The offset up to which everything was delivered."""
    return next((offset for offset, at_ms in enumerate(first_at) if at_ms == NEVER), len(first_at))


def _longest_gap_ms(times: Sequence[int]) -> int:
    return max((after - before for before, after in pairwise(times)), default=0)


# -------------------------------------------------------------------------------- duplicates, and what was in flight

Sample = tuple[int, dict[int, tuple[int, int]]]
"""What a process held at a time: by partition, the offsets that were committed and read."""
ROUND_MS = 2_000
"""Assignments to several replicas within this time are of one rebalance."""


@dataclass(slots=True)
class Round:
    """One rebalance of a task's group: who got partitions, and what could be delivered again because of it."""

    at_ms: int
    replicas: set[int]
    held: dict[int, list[range]] = field(default_factory=dict)
    """By partition, the offsets that processes had read and not committed, as last seen before."""
    in_flight: int = 0
    """How many they were."""
    again: set[tuple[int, int]] = field(default_factory=set)
    """Those of them that were delivered again."""


def rounds_of(assignments: Iterable[tuple[int, int]]) -> list[Round]:
    """Rebalances from assignments (time, replica)."""
    rounds: list[Round] = []
    for at_ms, replica in sorted(assignments):
        if rounds and at_ms - rounds[-1].at_ms <= ROUND_MS and replica not in rounds[-1].replicas:
            rounds[-1].replicas.add(replica)
        else:
            rounds.append(Round(at_ms, {replica}))
    return rounds


def held_before(since_ms: int, at_ms: int, samples: Sequence[Sample], growth: int) -> dict[int, tuple[range, int]]:
    """What a process had read and not committed before a rebalance, by partition, and how many these were last seen.

    What it held at some time since the rebalance before counts, since it lets go of partitions before others get them.
    A process that was killed, or is paused, is asked in vain: then it is what was seen last. Where it was still reading
    at that time, it may have read up to ``growth`` more.
    """
    upto = bisect_right(samples, at_ms, key=lambda sample: sample[0])
    begin = min(bisect_right(samples, since_ms, key=lambda sample: sample[0]), max(upto - 1, 0))
    held = {}
    for index in range(begin, upto):
        before = samples[index - 1][1] if index else {}
        for partition, (committed, position) in samples[index][1].items():
            reading = before.get(partition, (0, 0))[1] != position
            held[partition] = (range(committed, position + growth * reading), position - committed)
    return held


def explain(
    rounds: Sequence[Round],
    duplicates: Iterable[Duplicate],
    processes: Iterable[Sequence[Sample]],
    growth: int,
) -> list[Duplicate]:
    """Find the rebalance behind each duplicate; those that have none.

    A record may come again once for each rebalance before which somebody had it in flight: read and not committed.
    """
    for samples in processes:
        since_ms = 0
        for it in rounds:
            for partition, (offsets, count) in held_before(since_ms, it.at_ms, samples, growth).items():
                it.held.setdefault(partition, []).append(offsets)
                it.in_flight += count
            since_ms = it.at_ms
            if not samples or it.at_ms > samples[-1][0]:
                break  # it has ended, and by now others have what was its own
    unexplained = []
    for duplicate in duplicates:
        record = (duplicate.partition, duplicate.offset)
        upto = bisect_right(rounds, duplicate.at_ms + CLOCK_MS, key=lambda it: it.at_ms)
        for it in reversed(rounds[:upto]):
            held = it.held.get(duplicate.partition, ())
            if record not in it.again and any(duplicate.offset in offsets for offsets in held):
                it.again.add(record)
                break
        else:
            unexplained.append(duplicate)
    return unexplained
