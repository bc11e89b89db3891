"""Two sets of results against each other, matched by source record. No I/O but for a temporary file, no clock.

Results of either side may come in any order, and the sides one after the other or in turns. Each source record gets one
verdict, as soon as both sides have told of it; the rest at the end. Metrics (step times, batch sizes, latency,
throughput) are gathered apart and are never a difference.

Memory: what waits for the other side takes its result, of all together up to ``HELD_BYTES``; beyond, results go to a
temporary file, and 150 bytes remain of each. Of what is matched one bit remains, so that a result that comes twice is
known; only the examples are kept in full.
"""

from __future__ import annotations

import os
import random
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import IO, Any, NamedTuple, Self

import orjson

from streamproc.records import TopicRecord
from streamproc.replay.distribution import Distribution
from streamproc.replay.marks import Source
from streamproc.replay.results import Result, read
from streamproc.replay.values import ABSENT, Change, Rules, compare, number_of

HELD_BYTES = 128 << 20
MAX_FIELDS = 1_000
MAX_TRANSITIONS = 200
MAX_TRANSITION_CHARS = 60
SAMPLED_FIELDS = 50
SAMPLE = 500
FURTHER = "(further fields)"
SHORTEST_MS = 100
"""Of less time no throughput is told: one producer batch has one timestamp."""

BASELINE, CANDIDATE = 0, 1
SIDES = ("baseline", "candidate")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

_WORD_BITS = 8
_HEAD = struct.Struct("<?i")
_NO_KEY = -1


class Verdict(StrEnum):
    """What became of a source record on both sides. The values are public."""

    EQUAL = "equal"
    CLOSE = "close"
    """Numbers differ, all within their tolerances."""
    CHANGED = "changed"
    FAILED = "failed"
    """A result before, a dead letter now."""
    MENDED = "mended"
    """A dead letter before, a result now."""
    MISSING = "missing"
    """In the baseline only."""
    EXTRA = "extra"
    """In the candidate only."""


DIFFERENCES = (Verdict.CHANGED, Verdict.FAILED, Verdict.MENDED, Verdict.MISSING, Verdict.EXTRA)


class Limit(NamedTuple):
    """How many records may differ: a number of them, or a share in percent."""

    number: float
    is_percent: bool

    @classmethod
    def parse(cls, text: str) -> Limit:
        """``10``, or ``0.5%``. Raises ValueError."""
        number = number_of(text.removesuffix("%"))
        if number is None:
            raise ValueError(f"{text!r} is no limit: write a number of records, or a share of them such as 0.5%")
        return cls(number, text.endswith("%"))

    def allows(self, differing: int, records: int) -> bool:
        """Whether so many of so many records may differ."""
        return differing * 100 <= self.number * records if self.is_percent else differing <= self.number

    def __str__(self) -> str:
        return f"{self.number:g}{' %' if self.is_percent else ''}"


@dataclass(slots=True)
class Side:
    """What was read of one side, differences aside."""

    name: str
    results: int = 0
    dead_letters: int = 0
    repeated: int = 0
    """Results, or dead letters, of source records that had one already: at-least-once delivery allows for some."""
    without_source: int = 0
    """Records that are nobody's results."""
    causes: Counter[str] = field(default_factory=Counter)
    tasks: set[str] = field(default_factory=set)
    first_ms: int | None = None
    last_ms: int | None = None
    latency_ms: Distribution = field(default_factory=Distribution)
    steps_ms: dict[str, Distribution] = field(default_factory=dict)
    """Per batch: the backend's steps, ``total``, and ``queue``, the wait for the worker."""
    batch_size: Distribution = field(default_factory=Distribution)
    _metrics: dict[str, Any] | None = None
    _carriers: int = 0
    """Results with these metrics that are not counted yet."""

    @property
    def records_per_s(self) -> float | None:
        """Results over the time between the first one's and the last one's; None where that is too short to tell."""
        if self.first_ms is None or self.last_ms is None or self.last_ms - self.first_ms < SHORTEST_MS:
            return None
        return self.results * 1_000 / (self.last_ms - self.first_ms)

    def add(self, result: Result) -> None:
        """Count a result, or a dead letter."""
        self.tasks.add(result.task)
        if result.cause is not None:
            self.dead_letters += 1
            self.causes[result.cause] += 1
            return
        self.results += 1
        at = result.timestamp
        self.first_ms = at if self.first_ms is None else min(self.first_ms, at)
        self.last_ms = at if self.last_ms is None else max(self.last_ms, at)
        if result.latency_ms is not None:
            self.latency_ms.add(result.latency_ms)
        # Each of a batch's results carries its metrics, and most stand beside one another.
        if result.metrics == self._metrics:
            self._carriers += 1
        else:
            self.settle()
            self._metrics, self._carriers = result.metrics, 1

    def settle(self) -> None:
        """Count the metrics of the last results; to be called before the distributions are looked at.

        Each result counts for its share of its batch, so that a batch counts once, wherever its results are.
        """
        metrics, carriers = self._metrics or {}, self._carriers
        self._metrics, self._carriers = None, 0
        size = metrics.get("batch_size")
        if type(size) is not int or size < 1:
            return
        share = carriers / size
        self.batch_size.add(size, share)
        times = metrics.get("execution_times")
        steps = dict(times) if isinstance(times, dict) else {}
        steps |= {"total": metrics.get("total_execution_time"), "queue": metrics.get("queue_time")}
        for step, time_ms in steps.items():
            if isinstance(time_ms, int | float):
                if step not in self.steps_ms:
                    self.steps_ms[step] = Distribution()
                self.steps_ms[step].add(time_ms, share)


@dataclass(slots=True)
class FieldChanges:
    """What differs in one field, over all records."""

    path: str
    is_sampled: bool
    changed: int = 0
    """Records in which it has changed."""
    close: int = 0
    """Records in which it is within its tolerance."""
    numbers: int = 0
    sizes: float = 0.0
    max_size: float | None = None
    transitions: Counter[tuple[str, str]] = field(default_factory=Counter)
    """From what to what, where that is no floating-point number."""
    pairs: list[tuple[float, float]] = field(default_factory=list)
    """Where it is sampled, the numbers on both sides: of records in which it has changed, else where it is close."""
    sampled: int = 0

    @property
    def mean_size(self) -> float | None:
        """The mean absolute difference of the numbers that differ."""
        return self.sizes / self.numbers if self.numbers else None

    def add(self, change: Change, rng: random.Random) -> None:
        """Take in what differs in one record."""
        if change.is_close:
            self.close += 1
        else:
            self.changed += 1
        if change.size is not None:
            self.sizes += change.sizes
            self.numbers += change.numbers
            self.max_size = change.size if self.max_size is None else max(self.max_size, change.size)
        before, after = change.baseline, change.candidate
        if {type(before), type(after)} in ({float}, {float, int}):
            if self.is_sampled and change.size is not None:
                self._sample((float(before), float(after)), rng, is_close=change.is_close)
            return
        transition = (text_of(before, MAX_TRANSITION_CHARS), text_of(after, MAX_TRANSITION_CHARS))
        if transition in self.transitions or len(self.transitions) < MAX_TRANSITIONS:
            self.transitions[transition] += 1

    def _sample(self, pair: tuple[float, float], rng: random.Random, *, is_close: bool) -> None:
        """Each pair has the same chance to be kept; where something has changed, what is close is not looked at."""
        if is_close and self.changed:
            return
        if not is_close and self.changed == 1:
            self.pairs.clear()
            self.sampled = 0
        self.sampled += 1
        if len(self.pairs) < SAMPLE:
            self.pairs.append(pair)
        elif (at := rng.randrange(self.sampled)) < SAMPLE:
            self.pairs[at] = pair


@dataclass(frozen=True, slots=True)
class Example:
    """A source record that differs, in full; a side is None where it has nothing."""

    verdict: Verdict
    task: str
    source: Source
    key: bytes | None
    baseline: Held | None
    candidate: Held | None
    changes: Sequence[Change]

    @property
    def place(self) -> str:
        """The source record, for people."""
        return visible(f"{self.source.topic}/{self.source.partition}/{self.source.offset}")


class Held(NamedTuple):
    """What a side says of a source record: an output, or the reason of a dead letter."""

    is_dead: bool
    key: bytes | None
    encoded: bytes

    @property
    def value(self) -> Any:
        """The output, or the reason."""
        return orjson.loads(self.encoded)

    def pack(self) -> bytes:
        """As bytes, for ``unpack``."""
        key_size = _NO_KEY if self.key is None else len(self.key)
        return _HEAD.pack(self.is_dead, key_size) + (self.key or b"") + self.encoded

    @classmethod
    def unpack(cls, packed: bytes) -> Held:
        """What ``pack`` made."""
        is_dead, key_size = _HEAD.unpack_from(packed)
        start = _HEAD.size + max(key_size, 0)
        return cls(is_dead, None if key_size == _NO_KEY else packed[_HEAD.size : start], packed[start:])


class Comparison:
    """Takes in the records of both sides, and judges each source record. A context manager, for its temporary file.

    Args:
        rules: How values are compared.
        examples: How many of each kind of difference to keep in full.
        ignore_task: Match results of different tasks too.
        held_bytes: How much may wait in memory for its other side.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        names: tuple[str, str] = SIDES,
        examples: int = 10,
        ignore_task: bool = False,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        self.rules = rules
        self.sides = (Side(names[BASELINE]), Side(names[CANDIDATE]))
        self.verdicts: Counter[Verdict] = Counter()
        self.fields: dict[str, FieldChanges] = {}
        self.examples: list[Example] = []
        self._examples = examples
        self._ignore_task = ignore_task
        self._lanes: dict[tuple[str, str, int], _Lane] = {}
        self._store = _Store(held_bytes)
        self._shown: Counter[Verdict] = Counter()
        self._rng = random.Random(0)  # noqa: S311 - chooses what a chart shows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    @property
    def records(self) -> int:
        """Source records that have a verdict."""
        return self.verdicts.total()

    @property
    def differing(self) -> int:
        """Source records that differ by more than their tolerances."""
        return sum(self.verdicts[it] for it in DIFFERENCES)

    @property
    def waiting(self) -> int:
        """Source records that one side has told of, and the other has not."""
        return sum(len(it) for lane in self._lanes.values() for it in lane.pending)

    def add_all(self, side: int, records: Iterable[TopicRecord]) -> None:
        """Take in records of one side: ``BASELINE`` or ``CANDIDATE``."""
        for record in records:
            self.add(side, record)

    def add(self, side: int, record: TopicRecord) -> Result | None:
        """Take in a record of one side; what it says, None where that is nothing."""
        result = read(record)
        here = self.sides[side]
        if result is None:
            here.without_source += 1
            return None
        here.add(result)
        task, source = "" if self._ignore_task else result.task, result.source
        place = (task, source.topic, source.partition)
        lane = self._lanes.get(place)
        if lane is None:
            lane = self._lanes[place] = _Lane()
        if not lane.seen[side].add(source.offset):
            here.repeated += 1
            return result
        held = Held(result.cause is not None, result.key, orjson.dumps(result.value, option=orjson.OPT_SORT_KEYS))
        other = lane.pending[1 - side].pop(source.offset, None)
        if other is None:
            lane.pending[side][source.offset] = self._store.keep(held.pack())
            return result
        before = Held.unpack(self._store.take(other))
        baseline, candidate = (before, held) if side == CANDIDATE else (held, before)
        self._judge(result.task, source, baseline, candidate)
        return result

    def finish(self) -> None:
        """Judge what only one side has told of; to be called once, at the end."""
        for (task, topic, partition), lane in sorted(self._lanes.items()):
            for side, verdict in ((BASELINE, Verdict.MISSING), (CANDIDATE, Verdict.EXTRA)):
                for offset, stored in sorted(lane.pending[side].items()):
                    self.verdicts[verdict] += 1
                    if self._shown[verdict] < self._examples:
                        held = Held.unpack(self._store.take(stored))
                        source = Source(topic, partition, offset)
                        before, after = (held, None) if side == BASELINE else (None, held)
                        self._show(Example(verdict, task, source, held.key, before, after, ()))
                lane.pending[side].clear()

    def _judge(self, task: str, source: Source, baseline: Held, candidate: Held) -> None:
        changes: list[Change] = []
        if baseline.is_dead != candidate.is_dead:
            verdict = Verdict.FAILED if candidate.is_dead else Verdict.MENDED
        elif baseline.encoded == candidate.encoded:
            verdict = Verdict.EQUAL
        elif baseline.is_dead:
            # A message may quote the record, or the worker's number; the cause is what counts.
            changes = compare({"cause": baseline.value["cause"]}, {"cause": candidate.value["cause"]}, Rules())
            verdict = Verdict.CHANGED if changes else Verdict.EQUAL
        else:
            changes = compare(baseline.value, candidate.value, self.rules)
            close = all(it.is_close for it in changes)
            verdict = Verdict.EQUAL if not changes else Verdict.CLOSE if close else Verdict.CHANGED
        self.verdicts[verdict] += 1
        for change in changes:
            self._count(change)
        if verdict is not Verdict.EQUAL and self._shown[verdict] < self._examples:
            self._show(Example(verdict, task, source, candidate.key, baseline, candidate, changes))

    def _count(self, change: Change) -> None:
        path = change.path if change.path in self.fields or len(self.fields) < MAX_FIELDS else FURTHER
        found = self.fields.get(path)
        if found is None:
            found = self.fields[path] = FieldChanges(path, is_sampled=len(self.fields) < SAMPLED_FIELDS)
        found.add(change, self._rng)

    def _show(self, example: Example) -> None:
        self._shown[example.verdict] += 1
        self.examples.append(example)

    def worst_fields(self) -> list[FieldChanges]:
        """The fields that differ: those that changed in most records first."""
        return sorted(self.fields.values(), key=lambda it: (-it.changed, -it.close, it.path))

    def as_json(self, limit: Limit) -> dict[str, Any]:
        """Everything, ready for JSON."""
        records = self.records
        return {
            "passed": limit.allows(self.differing, records),
            "limit": str(limit),
            "records": records,
            "differing": self.differing,
            "verdicts": {it.value: self.verdicts[it] for it in Verdict},
            "baseline": _side_as_json(self.sides[BASELINE]),
            "candidate": _side_as_json(self.sides[CANDIDATE]),
            "fields": [_field_as_json(it) for it in self.worst_fields()],
            "metrics": [asdict(it) for it in metrics_of(self.sides)],
            "examples": [_example_as_json(it) for it in self.examples],
        }


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of both sides, and the candidate's over the baseline's; None where it is not known."""

    name: str
    quantile: str
    """One of ``QUANTILES``, or nothing."""
    unit: str
    baseline: float | None
    candidate: float | None
    ratio: float | None


def distributions_of(sides: tuple[Side, Side]) -> list[tuple[str, str, Distribution, Distribution]]:
    """What is spread on both sides, where it is known of one: name, unit, and the distributions."""
    before, after = sides
    before.settle()
    after.settle()
    nothing = Distribution()
    found = [
        ("latency", "ms", before.latency_ms, after.latency_ms),
        *(
            (step, "ms", before.steps_ms.get(step, nothing), after.steps_ms.get(step, nothing))
            for step in {**before.steps_ms, **after.steps_ms}
        ),
        ("batch size", "records", before.batch_size, after.batch_size),
    ]
    return [it for it in found if it[2].weight or it[3].weight]


def metrics_of(sides: tuple[Side, Side]) -> list[Metric]:
    """The sides' metrics, side by side."""
    before, after = sides
    rows = [_metric("throughput", "", "records/s", before.records_per_s, after.records_per_s)]
    for name, unit, *both in distributions_of(sides):
        for quantile, share in QUANTILES.items():
            a, b = (it.quantile(share) for it in both)
            if unit == "records":
                a, b = (None if it is None else float(round(it)) for it in (a, b))
            rows.append(_metric(name, quantile, unit, a, b))
    return rows


def _metric(name: str, quantile: str, unit: str, baseline: float | None, candidate: float | None) -> Metric:
    ratio = candidate / baseline if baseline and candidate is not None else None
    return Metric(name, quantile, unit, _rounded(baseline), _rounded(candidate), _rounded(ratio))


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")


def _side_as_json(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "results": side.results,
        "dead_letters": side.dead_letters,
        "causes": dict(side.causes),
        "repeated": side.repeated,
        "without_source": side.without_source,
    }


def _field_as_json(it: FieldChanges) -> dict[str, Any]:
    return {
        "path": it.path,
        "changed": it.changed,
        "close": it.close,
        "mean_absolute_difference": it.mean_size,
        "max_absolute_difference": it.max_size,
        "transitions": [[*both, count] for both, count in it.transitions.most_common(20)],
    }


def _example_as_json(it: Example) -> dict[str, Any]:
    return {
        "verdict": it.verdict.value,
        "task": it.task,
        "source": it.source._asdict(),
        "key": None if it.key is None else it.key.decode(errors="replace"),
        "baseline": None if it.baseline is None else it.baseline.value,
        "candidate": None if it.candidate is None else it.candidate.value,
        "changes": [
            {"path": change.worst, **{side: value for side, value in _both(change) if value is not ABSENT}}
            for change in it.changes
        ],
    }


def _both(change: Change) -> list[tuple[str, Any]]:
    return list(zip(SIDES, (change.baseline, change.candidate), strict=True))


def text_of(value: Any, chars: int) -> str:
    """A value as JSON of at most so many characters, with escapes in place of what cannot be seen."""
    text = repr(value) if value is ABSENT else orjson.dumps(value).decode()
    if len(text) > chars:
        text = f"{text[: chars - 1]}…"
    return visible(text)


def visible(text: str) -> str:
    """A text with escapes in place of what cannot be seen, or would move what is around it."""
    if text.isprintable():
        return text
    return "".join(it if it.isprintable() else it.encode("unicode_escape").decode() for it in text)


class _Offsets:
    """A set of offsets: a bit each where they are neighbours, and no more than in a set where they are not."""

    def __init__(self) -> None:
        self._words: dict[int, int] = {}

    def add(self, offset: int) -> bool:
        """Whether it is new."""
        word, bit = offset >> _WORD_BITS, 1 << (offset & ((1 << _WORD_BITS) - 1))
        before = self._words.get(word, 0)
        self._words[word] = before | bit
        return not before & bit


class _Lane:
    """What is known of the source records of one partition, for one task, by side."""

    def __init__(self) -> None:
        self.seen = (_Offsets(), _Offsets())
        self.pending: tuple[dict[int, _Stored], dict[int, _Stored]] = ({}, {})


_Stored = bytes | int
"""What waits: itself, or where it is in the temporary file."""


class _Store:
    """Keeps bytes: in memory as long as there is room, then in a temporary file."""

    def __init__(self, memory_bytes: int) -> None:
        self._room = memory_bytes
        self._file: IO[bytes] | None = None
        self._end = 0
        self._spilled = 0
        self._unwritten = False

    def keep(self, packed: bytes) -> _Stored:
        """Keep these; what to give to ``take`` for them."""
        if len(packed) <= self._room:
            self._room -= len(packed)
            return packed
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="streamproc-diff-", buffering=1 << 20)  # noqa: SIM115 - see close
        at = self._end
        self._file.write(len(packed).to_bytes(8, "little") + packed)
        self._end += 8 + len(packed)
        self._spilled += 1
        self._unwritten = True
        return at

    def take(self, stored: _Stored) -> bytes:
        """What was kept, which is let go."""
        if isinstance(stored, bytes):
            self._room += len(stored)
            return stored
        if self._file is None:
            raise AssertionError("what is in the file was put there")
        if self._unwritten:
            self._file.flush()
            self._unwritten = False
        descriptor = self._file.fileno()
        size = int.from_bytes(os.pread(descriptor, 8, stored), "little")
        packed = os.pread(descriptor, size, stored + 8)
        self._spilled -= 1
        if not self._spilled:
            self._file.seek(0)
            self._file.truncate()
            self._end = 0
        return packed

    def close(self) -> None:
        """Let go of everything."""
        if self._file is not None:
            self._file.close()
            self._file = None
