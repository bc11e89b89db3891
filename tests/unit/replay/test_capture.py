"""Capturing without Kafka: the common order, the last records, and going on after an interruption."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.record_lines import PlacedRecord
from streamproc.records import TopicPartition, TopicRecord
from streamproc.replay import capture as capturing
from streamproc.replay import capture_file
from streamproc.replay.capture import Bounds, CaptureError, Files, Plan, Progress, in_order, last_begins, recover
from streamproc.replay.capture_file import read_capture
from streamproc.replay.mask import Masker, parse_rule
from streamproc.replay.merge import Merge

Logs = dict[TopicPartition, list[PlacedRecord]]


class FakeReader:
    """Partitions in memory; hands out as many records as chance wants, of whichever partition."""

    def __init__(self, logs: Logs, ends: Mapping[TopicPartition, int], seed: int = 0) -> None:
        self._logs = logs
        self._ends = ends
        self._chance = random.Random(seed)
        self._positions: dict[TopicPartition, int] = {}
        self.held = 0
        self.dies_after: int | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        self._positions = dict(positions)

    def drop(self, *partitions: TopicPartition) -> None:
        for partition in partitions:
            assert partition in self._positions

    async def getmany(
        self, *, timeout_ms: int, max_records: int | None = None, partitions: Collection[TopicPartition] = ()
    ) -> Mapping[TopicPartition, Sequence[TopicRecord]]:
        assert timeout_ms > 0
        assert partitions
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                raise KeyboardInterrupt
        found: dict[TopicPartition, Sequence[TopicRecord]] = {}
        for partition in partitions:
            most = self._chance.randint(0, min(5, max_records or 5))
            position = self._positions[partition]
            records = [it for it in self._logs[partition] if it.offset >= position][:most]
            if records:
                found[partition] = records
                self._positions[partition] = records[-1].offset + 1
            elif most and position < self._ends[partition]:
                self._positions[partition] = self._ends[partition]  # past what is no record
        return found

    async def position(self, partition: TopicPartition) -> int:
        return self._positions[partition]


@st.composite
def _logs(draw: st.DrawFn) -> tuple[Logs, dict[TopicPartition, int]]:
    """Partitions with gaps in their offsets and times that go back, and where they end."""
    logs: Logs = {}
    ends: dict[TopicPartition, int] = {}
    for name in draw(st.lists(st.sampled_from(["a-0", "a-1", "b-0", "c-2"]), min_size=1, unique=True)):
        partition = TopicPartition(name[0], int(name[2]))
        offset = draw(st.integers(0, 3))
        logs[partition] = []
        for number in range(draw(st.integers(0, 12))):
            offset += draw(st.integers(1, 3))
            time = draw(st.integers(0, 20))
            value = b'{"n":%d,"user":"u%d"}' % (number, number % 3)
            logs[partition].append(PlacedRecord(*partition, offset, time, b"k%d" % (number % 3), value, []))
        ends[partition] = offset + 1 + draw(st.integers(0, 2))
    return logs, ends


def _by_brute_force(logs: Logs) -> list[PlacedRecord]:
    """The smallest next record, one after the other."""
    left = {it: list(records) for it, records in logs.items()}
    order = []
    while heads := [(records[0].timestamp, it) for it, records in left.items() if records]:
        order.append(left[min(heads)[1]].pop(0))
    return order


async def _all(
    reader: FakeReader, begins: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int]
) -> list[TopicRecord]:
    return [record async for records in in_order(reader, begins, ends) for record in records]


@given(_logs(), st.integers())
def test_the_common_order_does_not_depend_on_how_records_come(
    topics: tuple[Logs, dict[TopicPartition, int]], seed: int
) -> None:
    logs, ends = topics
    begins = dict.fromkeys(ends, 0)
    assert asyncio.run(_all(FakeReader(logs, ends, seed), begins, ends)) == _by_brute_force(logs)


@given(_logs(), st.integers(), st.data())
def test_only_what_is_between_the_offsets_is_read(
    topics: tuple[Logs, dict[TopicPartition, int]], seed: int, data: st.DataObject
) -> None:
    logs, ends = topics
    stops = {it: data.draw(st.integers(0, end)) for it, end in ends.items()}
    begins = {it: data.draw(st.integers(0, stop)) for it, stop in stops.items()}
    between = {it: [one for one in records if begins[it] <= one.offset < stops[it]] for it, records in logs.items()}
    assert asyncio.run(_all(FakeReader(logs, ends, seed), begins, stops)) == _by_brute_force(between)


@given(_logs(), st.integers(1, 40), st.integers())
def test_the_last_records_are_as_many_as_were_asked_for(
    topics: tuple[Logs, dict[TopicPartition, int]], count: int, seed: int
) -> None:
    logs, ends = topics
    logs = {it: [one._replace(timestamp=number * 3) for number, one in enumerate(them)] for it, them in logs.items()}
    begins = dict.fromkeys(ends, 0)

    async def test() -> list[TopicRecord]:
        reader = FakeReader(logs, ends, seed)
        return await _all(reader, await last_begins(reader, begins, ends, count), ends)

    assert asyncio.run(test()) == _by_brute_force(logs)[-count:]


def test_a_merge_waits_for_a_partition_that_may_have_more() -> None:
    one, other = TopicPartition("t", 0), TopicPartition("t", 1)
    merge = Merge([one, other])
    merge.add(one, [PlacedRecord("t", 0, 0, 5, None, None, [])])
    assert merge.take() == []
    assert merge.dry == {other}
    merge.end(other)
    assert [record.offset for record in merge.take()] == [0]
    assert not merge.done
    merge.end(one)
    assert merge.done


def test_a_partition_that_brings_nothing_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "_SILENT_POLLS", 3)
    partition = TopicPartition("t", 0)

    class Silent(FakeReader):
        async def getmany(self, **_: object) -> Mapping[TopicPartition, Sequence[TopicRecord]]:
            return {}

    with pytest.raises(CaptureError, match="topic t, partition 0 has brought nothing"):
        asyncio.run(_all(Silent({partition: []}, {partition: 9}), {partition: 0}, {partition: 9}))


def _plan(logs: Logs, ends: Mapping[TopicPartition, int]) -> Plan:
    return Plan(asked={}, bounds=[Bounds(topic=it.topic, partition=it.partition, begin=0, end=ends[it]) for it in logs])


async def _capture(reader: FakeReader, plan: Plan, files: Files, masker: Masker | None) -> Progress:
    resumed = files.part.exists()
    progress = recover(files, plan) if resumed else Progress(plan.begins)
    await capturing.capture(reader, plan, files, progress, masker=masker, append=resumed, on_records=lambda _: None)
    return progress


_MASKER = Masker([parse_rule("key=hash"), parse_rule("value.user=fake")], b"salt")


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.parquet"])
@given(topics=_logs(), seed=st.integers(), masker=st.sampled_from([None, _MASKER]), data=st.data())
def test_a_capture_that_was_interrupted_anywhere_comes_to_the_same_file(
    name: str,
    topics: tuple[Logs, dict[TopicPartition, int]],
    seed: int,
    masker: Masker | None,
    data: st.DataObject,
) -> None:
    logs, ends = topics
    plan = _plan(logs, ends)
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_file, "MEMBER_BYTES", 250)
        whole, broken = Files(Path(directory) / "whole" / name), Files(Path(directory) / "broken" / name)
        for files in (whole, broken):
            files.path.parent.mkdir()
            files.begin(plan)
        asyncio.run(_capture(FakeReader(logs, ends, seed), plan, whole, masker))
        reader = FakeReader(logs, ends, seed + 1)
        for _ in range(data.draw(st.integers(0, 3))):
            reader.dies_after = data.draw(st.integers(0, 6))
            try:
                asyncio.run(_capture(reader, plan, broken, masker))
            except KeyboardInterrupt:
                # As a kill may: the last write is torn anywhere.
                size = broken.part.stat().st_size
                with broken.part.open("ab") as file:
                    file.truncate(data.draw(st.integers(0, size)))
                assert broken.read_plan() == plan
                assert not broken.path.exists()
            else:
                break
        else:
            reader.dies_after = None
            asyncio.run(_capture(reader, plan, broken, masker))
        assert whole.path.read_bytes() == broken.path.read_bytes()
        assert [path.name for path in broken.path.parent.iterdir()] == [name]
        expected = _by_brute_force(logs)
        assert list(read_capture(whole.path)) == (expected if masker is None else [masker(it) for it in expected])


def _interrupted(tmp_path: Path, text: str) -> tuple[Files, Plan]:
    partition = TopicPartition("t", 0)
    plan = _plan({partition: []}, {partition: 9})
    files = Files(tmp_path / "c.jsonl")
    files.begin(plan)
    files.part.write_text(text)
    return files, plan


def _line(offset: int, topic: str = "t") -> str:
    return f'{{"topic":"{topic}","partition":0,"offset":{offset},"timestamp":5,"key":null,"headers":[],"value":1}}\n'


@pytest.mark.parametrize("text", [_line(9), _line(3) + _line(3), _line(1, "other")])
def test_a_file_that_does_not_match_its_plan_is_not_gone_on_with(text: str, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="is not what this capture would have next"):
        recover(*_interrupted(tmp_path, text))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"c\.jsonl\.part:2: the line is not JSON"):
        recover(*_interrupted(tmp_path, _line(0) + "{}}\n" + _line(1)))


def test_a_torn_last_line_is_cut_away(tmp_path: Path) -> None:
    files, plan = _interrupted(tmp_path, _line(0) + _line(5) + _line(6)[:20])
    progress = recover(files, plan)
    assert files.part.read_text() == _line(0) + _line(5)
    assert (progress.records, progress.positions) == (2, {TopicPartition("t", 0): 6})


def test_what_retention_may_have_taken_is_told() -> None:
    one, other = TopicPartition("t", 0), TopicPartition("t", 1)
    progress = Progress({one: 0, other: 0})
    for partition in (one, other):
        progress.fetched(partition, [PlacedRecord(*partition, 5, 0, None, None, [])], 2)
        progress.fetched(partition, [PlacedRecord(*partition, 9, 0, None, None, [])], 6)
    # Partition 1 begins before its gaps: they are those of compaction or of transactions.
    (told,) = progress.lost({one: 7, other: 2})
    assert told.startswith("topic t, partition 0: retention has removed records while they were captured")
    assert told.endswith("some from offset 2 to 4 may be missing")


def test_a_plan_is_not_for_others_to_read_and_what_is_no_plan_is_told(tmp_path: Path) -> None:
    files = Files(tmp_path / "c.jsonl")
    assert files.read_plan() is None
    files.begin(Plan(asked={}, bounds=[], salt="00"))
    assert files.plan.stat().st_mode & 0o077 == 0
    files.plan.write_text("{}")
    with pytest.raises(CaptureError, match="is no plan of a capture"):
        files.read_plan()


def test_many_partitions_are_fetched_in_smaller_parts() -> None:
    assert capturing.fetch_bytes(1) == 1 << 20
    assert capturing.fetch_bytes(256) == 1 << 18
    assert capturing.fetch_bytes(100_000) == 1 << 16
