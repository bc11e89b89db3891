"""Batches of a wanted shape, made of sample records: n of them, the longest of which has the wanted length.

A batch is filled with records that are about as long as its longest, as the batcher would fill it, drawn with a seed
and as often as it takes. Where no sample has a wanted length, the longest text of a longer one is cut; nothing is made
longer than it came. So what is beyond the longest sample was not measured, and ``reach`` says how far that is.
"""

from __future__ import annotations

import contextlib
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson

from streamproc.runtime.lengths import LengthError, checked, of_field
from streamproc.settings import LengthSettings

Record = dict[str, Any]
Measure = Callable[[Record], int]

NEAR = 1.125
"""Records of a batch are at most so many times shorter than the longest: the ratio of the batcher's buckets."""
CURIOSITIES = 50
"""One sample in so many is shorter than what is measured."""
LEAST_SHARE = 0.5
"""A record is cut only where one text is at least this part of it: that is what its length comes from."""


def measure_of(setting: LengthSettings | None, by_backend: Measure) -> Measure:
    """How long a record is, by a task's ``batch.length``; where it has none every record has the length 1.

    A function for a field raises LengthError for a record that has no such length.
    """
    if setting is None:
        return lambda _: 1
    if setting.of == "bytes":
        return lambda record: len(orjson.dumps(record))
    if setting.field is not None:
        of = of_field(setting.field, setting.unit)
        return lambda record: checked(of(record), f"the field {setting.field}")
    return by_backend


@dataclass(frozen=True, slots=True)
class Sample:
    """A record and its length; ``cut`` where it is a part of one that came."""

    length: int
    record: Record
    cut: bool = False


class Samples:
    """The records to make batches of; there is one at least. Those without a length are left out, as by the processor.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, records: Sequence[Record], measure: Measure) -> None:
        self._measure = measure
        self._made: dict[int, Sample] = {}
        self._sorted = sorted(_measured(records, measure), key=lambda it: it.length)
        if not self._sorted:
            raise ValueError("no sample record has a length")
        self._length_of = {id(it.record): it.length for it in self._sorted}

    @property
    def reach(self) -> tuple[int, int]:
        """The shortest and the longest length."""
        return self._sorted[0].length, self._sorted[-1].length

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self._sorted)

    def lengths(self, count: int) -> list[int]:
        """At most so many lengths to measure at, from a short one to the longest, in about equal ratios.

        A few are shorter still: the shortest of many samples is a curiosity.
        """
        least, most = self._sorted[len(self._sorted) // CURIOSITIES].length, self.reach[1]
        if least == most or count < 2:
            return [most]
        ratio = (most / max(least, 1)) ** (1 / (count - 1))
        wanted = [max(least, 1) * ratio**index for index in range(count)]
        found = {self.near(round(it)).length for it in wanted}
        return sorted(found | {most})

    def near(self, length: int) -> Sample:
        """A sample of about this length: the longest that is not longer, if it is near; a cut one; the nearest."""
        if length in self._made:
            return self._made[length]
        at = bisect_right(self._sorted, length, key=lambda it: it.length)
        shorter = self._sorted[at - 1] if at else None
        if shorter is not None and shorter.length * NEAR >= length:
            return shorter
        for longer in self._sorted[at : at + 1]:
            found = _cut(longer.record, length, self._measure)
            if found is not None and found.length * NEAR >= length:
                made = self._made.setdefault(found.length, found)
                self._length_of[id(made.record)] = made.length
                return made
        around = [it for it in (shorter, *self._sorted[at : at + 1]) if it is not None]
        return min(around, key=lambda it: max(it.length, length) / max(min(it.length, length), 1))

    def batch(self, size: int, length: int, rng: random.Random) -> list[Record]:
        """So many records of about this length, none of them longer."""
        start = bisect_left(self._sorted, length / NEAR, key=lambda it: it.length)
        stop = bisect_right(self._sorted, length, key=lambda it: it.length)
        others = self._sorted[start:stop] or [self.near(length)]
        return [it.record for it in rng.choices(others, k=size)]

    def longest(self, batch: Sequence[Record]) -> int:
        """What a batch is padded to."""
        return max(self._length_of[id(record)] for record in batch)


def _measured(records: Sequence[Record], measure: Measure) -> Iterator[Sample]:
    for record in records:
        with contextlib.suppress(LengthError):
            yield Sample(measure(record), record)


def _cut(record: Record, length: int, measure: Measure) -> Sample | None:
    """The record with its longest text cut so that it is no longer than that; None where no text is that long."""
    place = _longest_text(record)
    if place is None:
        return None
    path, text = place
    if measure(_with(record, path, "")) > min(length, (1 - LEAST_SHARE) * measure(record)):
        return None
    low, high = 0, len(text)  # what fits, and what does not
    while high - low > 1:
        middle = (low + high) // 2
        if measure(_with(record, path, text[:middle])) <= length:
            low = middle
        else:
            high = middle
    if not low:
        return None
    at_a_word = text.rfind(" ", low * 7 // 8, low + 1)
    made = _with(record, path, text[: at_a_word if at_a_word > 0 else low])
    return Sample(measure(made), made, cut=True)


def _longest_text(value: Any, path: tuple[str | int, ...] = ()) -> tuple[tuple[str | int, ...], str] | None:
    if isinstance(value, str):
        return path, value
    inner: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    found = [it for key, below in inner if (it := _longest_text(below, (*path, key))) is not None]
    return max(found, key=lambda it: len(it[1]), default=None)


def _with(record: Record, path: Sequence[str | int], text: str) -> Record:
    """A copy of the record with another text there."""

    def replaced(value: Any, rest: Sequence[str | int]) -> Any:
        if not rest:
            return text
        copied = value.copy()
        copied[rest[0]] = replaced(value[rest[0]], rest[1:])
        return copied

    return cast("Record", replaced(record, path))
