"""Captures topics into a file: reads partitions in their common order, and can go on after an interruption.

A capture that is not complete is two files beside the one that it will be:

    FILE.part      the records so far, as lines (``.part.gz`` where FILE is compressed, or Parquet)
    FILE.resume    the plan: what was asked for, and the offsets between which each partition is captured

Once all is there the first becomes FILE (or is written to it as Parquet) and the second goes, so FILE is there only
when it is complete.

Invariants:

- The records of a capture follow from its plan. Whoever goes on reads, of each partition, from behind its last record
  in the file, and the order follows from the records alone (``merge``): it comes to the same file.
- Of each partition no more is in memory than ``RECORDS_AHEAD`` records and one fetch (``fetch_bytes``, or one batch of
  the topic where that is larger), however large the topics are.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from streamproc.broker.interface import Reader
from streamproc.errors import StreamprocError
from streamproc.record_lines import LineError, PlacedRecord, read_exact
from streamproc.records import TopicPartition, TopicRecord
from streamproc.replay.capture_file import LineWriter, is_gzip, is_parquet, part_of, read_capture, write_capture
from streamproc.replay.mask import Masker
from streamproc.replay.merge import Merge

RECORDS_AHEAD = 2_000
_ALL_FETCHES_BYTES = 64 << 20
_MIN_FETCH_BYTES = 1 << 16
_MAX_FETCH_BYTES = 1 << 20
_POLL_MS = 500
_SILENT_POLLS = 120
_ROWS_AT_ONCE = 1_000


class CaptureError(StreamprocError):
    """A capture cannot be begun, gone on with, or brought to its end."""


class Bounds(BaseModel):
    """Between which offsets a partition is captured; ``end`` is behind the last one."""

    model_config = ConfigDict(extra="forbid")

    topic: str
    partition: int
    begin: int
    end: int


class Plan(BaseModel):
    """What a capture is to hold.

    ``asked`` is what its user asked for, by option; ``salt`` that of its masks, in hexadecimal, where it was made up.
    """

    model_config = ConfigDict(extra="forbid")

    asked: dict[str, str]
    bounds: list[Bounds]
    salt: str = ""

    @property
    def begins(self) -> dict[TopicPartition, int]:
        """Where each partition begins."""
        return {TopicPartition(it.topic, it.partition): it.begin for it in self.bounds}

    @property
    def ends(self) -> dict[TopicPartition, int]:
        """Where each partition ends."""
        return {TopicPartition(it.topic, it.partition): it.end for it in self.bounds}


class Files:
    """The files of a capture that is under way, by the name of the one that it will be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = ".part.gz" if is_gzip(path) or is_parquet(path) else ".part"
        self.part = path.with_name(path.name + lines)
        self.plan = path.with_name(path.name + ".resume")

    def begun(self) -> bool:
        """Whether an interrupted capture has left something."""
        return self.plan.exists() or self.part.exists()

    def begin(self, plan: Plan) -> None:
        """Write the plan, in place of what an interrupted capture has left. Raises CaptureError."""
        try:
            self.plan.unlink(missing_ok=True)
            self.part.unlink(missing_ok=True)
            # Whoever knows the salt can find out what was hashed by trying.
            descriptor = os.open(self.plan, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(orjson.dumps(plan.model_dump(), option=orjson.OPT_INDENT_2))
        except OSError as error:
            raise CaptureError(f"{self.plan}: cannot be written ({error.strerror})") from error

    def read_plan(self) -> Plan | None:
        """The plan of an interrupted capture; None where there is none. Raises CaptureError."""
        try:
            return Plan.model_validate_json(self.plan.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CaptureError(f"{self.plan}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            raise CaptureError(f"{self.plan}: is no plan of a capture; begin anew with --force") from error

    def finish(self) -> None:
        """Make the capture what it is to be. Raises CaptureError and CaptureFileError."""
        try:
            if is_parquet(self.path):
                made = part_of(self.path)
                made.unlink(missing_ok=True)
                with write_capture(made) as writer:
                    rows = read_capture(self.part)
                    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
                        writer.write(chunk)
                made.replace(self.path)
                self.part.unlink()
            else:
                self.part.replace(self.path)
            self.plan.unlink()
        except OSError as error:
            raise CaptureError(f"{self.path}: cannot be written ({error.strerror})") from error


class Progress:
    """How far a capture is: the next offset of each partition, and what retention may have taken before it was read."""

    def __init__(self, begins: Mapping[TopicPartition, int]) -> None:
        self.positions = dict(begins)
        self.records = 0
        self._first_gaps: dict[TopicPartition, tuple[int, int]] = {}

    def fetched(self, partition: TopicPartition, records: Sequence[TopicRecord], expected: int) -> None:
        """Records came where ``expected`` is the offset behind those before them."""
        if records[0].offset > expected:
            self._first_gaps.setdefault(partition, (expected, records[0].offset))

    def taken(self, records: Sequence[TopicRecord]) -> None:
        """These are in the file."""
        self.records += len(records)
        self.positions.update({(record.topic, record.partition): record.offset + 1 for record in records})  # type: ignore[misc] # equal to a TopicPartition

    def lost(self, begins: Mapping[TopicPartition, int]) -> Iterator[str]:
        """What may be missing, by where the partitions begin now: a sentence for each partition."""
        for partition, (first, stop) in self._first_gaps.items():
            if begins[partition] >= stop:
                yield (
                    f"topic {partition.topic}, partition {partition.partition}: retention has removed records while "
                    f"they were captured; some from offset {first:,} to {stop - 1:,} may be missing"
                )


def fetch_bytes(partitions: int) -> int:
    """How much to fetch of each partition at once, so that all together stay below 64 MiB where they are many."""
    return max(_MIN_FETCH_BYTES, min(_MAX_FETCH_BYTES, _ALL_FETCHES_BYTES // max(1, partitions)))


async def in_order(
    reader: Reader,
    begins: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    fetched: Callable[[TopicPartition, Sequence[TopicRecord], int], None] | None = None,
) -> AsyncIterator[list[TopicRecord]]:
    """The records of partitions between offsets, in their common order, as they come.

    Raises:
        CaptureError: a partition has not brought the records that it should have for a minute.
        BrokerError: reading failed.
    """
    merge = Merge(ends)
    expected = dict(begins)
    for partition in [it for it in ends if begins[it] >= ends[it]]:
        merge.end(partition)
    reader.assign({it: begins[it] for it in merge.dry})
    silent = 0
    while not merge.done:
        waiting = sorted(merge.dry)
        found = await reader.getmany(timeout_ms=_POLL_MS, max_records=RECORDS_AHEAD, partitions=waiting)
        for it, records in found.items():
            partition = TopicPartition(*it)
            if fetched is not None:
                fetched(partition, records, expected[partition])
            expected[partition] = records[-1].offset + 1
            # What came after the plan was made is not ours, or a busy topic would have no end.
            merge.add(partition, [record for record in records if record.offset < ends[partition]])
        for partition in waiting:
            if await reader.position(partition) >= ends[partition]:
                merge.end(partition)
                reader.drop(partition)
        silent = 0 if found or not merge.dry else silent + 1
        if silent >= _SILENT_POLLS:
            partition = min(merge.dry)
            raise CaptureError(
                f"topic {partition.topic}, partition {partition.partition} has brought nothing for "
                f"{_SILENT_POLLS * _POLL_MS // 1_000} s; see whether it has a leader, and begin again (a capture goes "
                f"on with --resume)"
            )
        if taken := merge.take():
            yield taken


async def last_begins(
    reader: Reader, begins: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int], count: int
) -> dict[TopicPartition, int]:
    """Where to begin so that the last ``count`` records of the common order come, or all where there are fewer.

    Reads the ends of the partitions once, and keeps 10 bytes of each of ``count`` records. Where offsets have gaps it
    looks further back.
    """
    partitions = sorted(ends)
    back = dict.fromkeys(partitions, count)
    while True:
        firsts = {it: max(begins[it], ends[it] - back[it]) for it in partitions}
        tail = _Tail(partitions, count)
        async for records in in_order(reader, firsts, ends):
            tail.add(records)
        short = [it for it in tail.short() if firsts[it] > begins[it]]
        if not short:
            return {it: tail.firsts.get(it, ends[it]) for it in partitions}
        for it in short:
            back[it] *= 2


class _Tail:
    """The last records of an order: of which partition each is, and its offset."""

    def __init__(self, partitions: Sequence[TopicPartition], count: int) -> None:
        self._partitions = partitions
        self._numbers = {it: number for number, it in enumerate(partitions)}
        self._count = count
        self._of = array("H")
        self._offsets = array("q")
        self._seen: dict[int, int] = {}
        """The offset of the first record of each partition."""

    def add(self, records: Sequence[TopicRecord]) -> None:
        for record in records:
            number = self._numbers[TopicPartition(record.topic, record.partition)]
            self._seen.setdefault(number, record.offset)
            self._of.append(number)
            self._offsets.append(record.offset)
        if len(self._of) > 2 * self._count + _ROWS_AT_ONCE:
            self._cut()

    def _cut(self) -> None:
        del self._of[: -self._count or None]
        del self._offsets[: -self._count or None]

    @property
    def firsts(self) -> dict[TopicPartition, int]:
        """The first offset of each partition that has records in the tail."""
        self._cut()
        found: dict[TopicPartition, int] = {}
        for number, offset in zip(self._of, self._offsets, strict=True):
            found.setdefault(self._partitions[number], offset)
        return found

    def short(self) -> list[TopicPartition]:
        """The partitions of which earlier records than were read could belong to the tail."""
        firsts = self.firsts
        complete = len(self._of) == self._count
        oldest = self._of[0] if complete and self._count else None
        short = []
        for number, partition in enumerate(self._partitions):
            seen = self._seen.get(number)
            if complete and seen is not None and (firsts.get(partition) != seen or number == oldest):
                continue  # a record of it that is older than the tail was read, or it has the tail's oldest
            short.append(partition)
        return short


async def capture(
    reader: Reader,
    plan: Plan,
    files: Files,
    progress: Progress,
    *,
    masker: Masker | None,
    append: bool,
    on_records: Callable[[int], None],
) -> None:
    """Read what is left of a plan to the end of the file.

    Raises:
        CaptureError, CaptureFileError, BrokerError: what is in the file is whole, and can be gone on with.
        MaskError: a record cannot be masked.
    """
    begins = {it: progress.positions[it] for it in plan.begins}
    with LineWriter(files.part, append=append) as writer:
        async for records in in_order(reader, begins, plan.ends, progress.fetched):
            writer.write(records if masker is None else [masker(record) for record in records])
            progress.taken(records)
            on_records(len(records))
    files.finish()


def recover(files: Files, plan: Plan) -> Progress:
    """How far an interrupted capture has come; a record that is not whole is cut away from its file.

    Raises:
        CaptureError: the file does not match the plan, or cannot be read.
    """
    progress = Progress(plan.begins)
    ends = plan.ends
    whole, number = 0, 0
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(files.part.open("rb"))
            for lines, whole in _members(file) if is_gzip(files.part) else _chunks(file):  # noqa: B007 - used below
                for line in lines:
                    number += 1
                    progress.taken([_recovered(line, progress, ends, f"{files.part}:{number}")])
        os.truncate(files.part, whole)
    except FileNotFoundError:
        return progress
    except OSError as error:
        raise CaptureError(f"{files.part}: cannot be read ({error.strerror})") from error
    return progress


def _recovered(line: bytes, progress: Progress, ends: Mapping[TopicPartition, int], place: str) -> PlacedRecord:
    try:
        record = read_exact(line)
    except LineError as error:
        raise CaptureError(f"{place}: the line {error}; the file is damaged, begin anew with --force") from error
    partition = TopicPartition(record.topic, record.partition)
    if partition not in ends or not progress.positions[partition] <= record.offset < ends[partition]:
        raise CaptureError(
            f"{place}: topic {record.topic}, partition {record.partition}, offset {record.offset} is not what this "
            f"capture would have next: the file is another's, or was changed; begin anew with --force"
        )
    return record


def _chunks(file: Any) -> Iterator[tuple[list[bytes], int]]:
    """The whole lines of a file, and where in it they end."""
    end = 0
    while lines := file.readlines(1 << 20):
        if not lines[-1].endswith(b"\n"):
            lines.pop()
        end += sum(map(len, lines))
        yield lines, end


def _members(file: Any) -> Iterator[tuple[list[bytes], int]]:
    """The lines of the whole gzip members of a file, and where in it these end."""
    end, rest = 0, b""
    while True:
        member, text = zlib.decompressobj(wbits=31), []
        while not member.eof:
            if not rest and not (rest := file.read(1 << 20)):
                return
            try:
                text.append(member.decompress(rest))
            except zlib.error:
                return  # what comes after a loss of power may be anything
            end += len(rest) - len(member.unused_data)
            rest = member.unused_data
        yield b"".join(text).split(b"\n")[:-1], end


def salted(text: bytes) -> str:
    """What tells one salt from another without telling it."""
    return hashlib.blake2b(text, digest_size=6, person=b"streamproc-salt").hexdigest()
