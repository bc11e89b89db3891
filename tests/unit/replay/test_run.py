"""Replaying into a broker in memory: order, places, marks, timestamps, and the pace with a clock of its own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.errors import BrokerError, RecordTooLargeError, TopicMissingError
from streamproc.record_lines import PlacedRecord
from streamproc.records import TopicPartition
from streamproc.replay.lanes import Lanes
from streamproc.replay.marks import RUN, Source, run_of, source_of
from streamproc.replay.pace import Deviation, FixedRate, OriginalPace, Pace, Unpaced
from streamproc.replay.run import EARLY_S, ReplayError, make_run_id, replay, wait_for_groups
from streamproc.testing import MemoryBroker, MemoryRecord


def _record(number: int, partition: int = 0, *, topic: str = "in", key: bytes | None = None) -> PlacedRecord:
    return PlacedRecord(topic, partition, 100 + number, 1_000 * number, key, b"%d" % number, [("h", b"x")])


async def _replay(
    broker: MemoryBroker, records: Iterable[PlacedRecord], pace: Pace | None = None, **options: Any
) -> tuple[Lanes, int]:
    """Replay into ``out``, unless told otherwise; the lanes, and how many records were acknowledged."""
    acknowledged = [0]

    def count(records: int) -> None:
        acknowledged[0] += records

    given: dict[str, Any] = {"target_of": lambda _: "out", "stamp": lambda timestamp: timestamp, **options}
    producer = broker.producer()
    lanes = Lanes(producer, "run-1", on_acknowledged=count, **given)
    try:
        await replay(iter(records), lanes, pace or Unpaced(), clock=_clock())
    finally:
        await producer.stop()
    return lanes, acknowledged[0]


def _clock() -> Callable[[], float]:
    return asyncio.get_running_loop().time


def _broker(partitions: int, **configs: str) -> MemoryBroker:
    broker = MemoryBroker(max_batch_bytes=500)
    broker.create_topic("out", partitions, configs={name.replace("_", "."): value for name, value in configs.items()})
    return broker


def _sources(records: Iterable[MemoryRecord]) -> list[Source | None]:
    return [source_of(record.headers) for record in records]


_captures = st.lists(
    st.builds(
        _record,
        st.integers(0, 1_000),
        st.integers(0, 5),
        topic=st.sampled_from(["in", "in2"]),
        key=st.none() | st.sampled_from([b"a", b"b", b"c"]),
    ),
    max_size=60,
)


@given(_captures, st.integers(1, 4))
def test_every_record_arrives_once_and_source_partitions_keep_their_order(
    capture: list[PlacedRecord], partitions: int
) -> None:
    capture = [it._replace(offset=number) for number, it in enumerate(capture)]
    broker = _broker(partitions)
    _, acknowledged = asyncio.run(_replay(broker, capture))
    assert acknowledged == len(capture)
    for number in range(partitions):
        expected = [Source(it.topic, it.partition, it.offset) for it in capture if it.partition % partitions == number]
        assert _sources(broker.records("out", number)) == expected


@given(_captures, st.integers(1, 4))
def test_by_key_the_records_of_a_key_keep_their_order_where_kafka_would_have_them(
    capture: list[PlacedRecord], partitions: int
) -> None:
    capture = [it._replace(offset=number) for number, it in enumerate(capture)]
    broker = _broker(partitions)
    asyncio.run(_replay(broker, capture, partition_of_key=broker.partition_of_key))
    for key in (b"a", b"b", b"c"):
        found = [it for it in broker.records("out") if it.key == key]
        assert _sources(found) == [Source(it.topic, it.partition, it.offset) for it in capture if it.key == key]
        assert {it.partition for it in found} <= {broker.partition_of_key(key, partitions)}
    assert len(broker.records("out")) == len(capture)


def test_a_record_keeps_what_it_has_and_is_marked() -> None:
    broker = _broker(3)
    record = PlacedRecord("in", 2, 7, 5_000, b"k", b"v", [("h", b"x"), (RUN, b"earlier"), ("h", None)])
    tombstone = record._replace(offset=8, value=None, key=None)
    asyncio.run(_replay(broker, [record, tombstone]))
    first, second = broker.records("out", 2)
    assert (first.timestamp, first.key, first.value) == (5_000, b"k", b"v")
    assert [it for it in first.headers if it[0] == "h"] == [("h", b"x"), ("h", None)]
    assert run_of(first.headers) == "run-1"
    assert source_of(first.headers) == Source("in", 2, 7)
    assert (second.key, second.value) == (None, None)


def test_timestamps_are_what_the_stamp_says() -> None:
    broker = _broker(1)
    asyncio.run(_replay(broker, [_record(1), _record(2)], stamp=lambda timestamp: timestamp + 5))
    assert [it.timestamp for it in broker.records("out")] == [1_005, 2_005]


def test_each_topic_goes_where_it_is_told_and_is_looked_at_once() -> None:
    broker = _broker(1)
    broker.create_topic("other")
    looked = []

    async def look(record: PlacedRecord, topic: str) -> None:
        looked.append((record.topic, topic))

    capture = [_record(0), _record(1, topic="in2"), _record(2), _record(3, 1, topic="in2")]
    targets = {"in": "out", "in2": "other"}
    lanes, _ = asyncio.run(_replay(broker, capture, target_of=targets.__getitem__, before_topic=look))
    assert looked == [("in", "out"), ("in2", "other")]
    assert len(broker.records("out")) == len(broker.records("other")) == 2
    assert sorted(lanes.partitions) == [("other", 0), ("out", 0)]


def test_a_topic_that_is_missing_is_an_error() -> None:
    with pytest.raises(TopicMissingError):
        asyncio.run(_replay(MemoryBroker(), [_record(0)]))


def test_a_batch_that_cannot_be_written_ends_the_run() -> None:
    broker = _broker(1)
    broker.fail_next("write", BrokerError("no room"))
    with pytest.raises(BrokerError, match="no room"):
        asyncio.run(_replay(broker, [_record(number) for number in range(5_000)]))


def test_a_record_that_is_too_large_for_its_topic_ends_the_run() -> None:
    broker = _broker(1, max_message_bytes="300")
    with pytest.raises(RecordTooLargeError):
        asyncio.run(_replay(broker, [_record(0), _record(1)._replace(value=b"x" * 400)]))


def test_batches_keep_to_what_the_topic_takes() -> None:
    broker = _broker(1, max_message_bytes="300")
    asyncio.run(_replay(broker, [_record(number) for number in range(200)]))
    assert len(broker.records("out")) == 200


def test_while_a_batch_is_on_its_way_its_lane_gathers() -> None:
    async def test() -> None:
        broker = _broker(1)
        producer = broker.producer()
        lanes = Lanes(producer, "run", target_of=lambda _: "out", stamp=lambda _: None, on_acknowledged=lambda _: None)
        with broker.acknowledgements_held():
            await lanes.send([_record(0)], [0.0], 0.0)
            await lanes.send([_record(1)], [0.0], 0.0)
            await lanes.write_gathered(0.0)
            assert len(lanes._pending) == 1  # what is on its way is nobody else's to see
        await lanes.pause(10)  # the first one's acknowledgement ends it
        await lanes.write_gathered(0.0)
        await lanes.finish(0.0)
        assert [it.value for it in broker.records("out")] == [b"0", b"1"]

    asyncio.run(test())


class _FakeLanes:
    """Takes note of what is sent when; time passes only where somebody waits."""

    def __init__(self) -> None:
        self.now = self.begun = 100.0
        self.sent: list[tuple[PlacedRecord, float, float]] = []
        self.finished = False

    async def send(self, records: list[PlacedRecord], dues: list[float], now: float) -> None:
        self.sent += [(record, due, now) for record, due in zip(records, dues, strict=True)]

    async def prepare(self, records: list[PlacedRecord]) -> None:
        assert records
        if not self.sent:
            self.now = self.begun = 107.0  # what this takes is no part of the pace

    async def pause(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds

    async def write_gathered(self, now: float) -> None:
        assert now == self.now - self.begun

    async def finish(self, now: float) -> None:
        assert now == self.now - self.begun
        self.finished = True


@given(
    st.lists(st.integers(0, 500), max_size=300),
    st.sampled_from([OriginalPace, lambda: OriginalPace(7.5), lambda: FixedRate(90), Unpaced]),
)
def test_each_record_goes_out_when_it_is_due(timestamps: list[int], make_pace: Callable[[], Pace]) -> None:
    lanes = _FakeLanes()
    records = [_record(number)._replace(timestamp=ms) for number, ms in enumerate(timestamps)]
    asyncio.run(replay(iter(records), cast("Lanes", lanes), make_pace(), clock=lambda: lanes.now))
    assert lanes.finished
    assert [record for record, _, _ in lanes.sent] == records
    pace = make_pace()
    for record, due, at in lanes.sent:
        assert due == pace.due(record.timestamp)
        assert due - EARLY_S <= at <= due + 0.001


def test_the_deviation_is_measured_for_each_partition() -> None:
    broker = _broker(2)
    deviation = Deviation()
    capture = [_record(number, number % 2)._replace(timestamp=number) for number in range(40)]
    asyncio.run(_replay(broker, capture, OriginalPace(), deviation=deviation))
    assert deviation.between_ms(1.0) is not None
    assert [it.value for it in broker.records("out", 1)] == [b"%d" % number for number in range(1, 40, 2)]


def test_what_holds_up_a_run_sees_every_record_before_it_is_written() -> None:
    broker = _broker(1)
    seen: list[PlacedRecord] = []

    async def hold(records: Any) -> None:
        assert len(broker.records("out")) <= len(seen)
        seen.extend(records)

    async def test() -> None:
        producer = broker.producer()
        lanes = Lanes(producer, "r", target_of=lambda _: "out", stamp=lambda _: None, on_acknowledged=lambda _: None)
        await replay(iter(capture), lanes, Unpaced(), clock=_clock(), before_sending=hold)

    capture = [_record(number) for number in range(5_000)]
    asyncio.run(test())
    assert seen == capture


def test_a_group_is_waited_for_until_it_has_everything() -> None:
    async def test() -> None:
        broker = _broker(2)
        for number in range(10):
            broker.append("out", b"x", partition=number % 2)
        group = broker.group("readers")
        lags = []

        def on_lag(records: int) -> None:
            lags.append(records)
            done = len(lags) * 2
            group.offsets.update({TopicPartition("out", 0): min(done, 5), TopicPartition("out", 1): min(done, 5)})

        await wait_for_groups(
            broker.admin(), ["readers"], [("out", 0), ("out", 1)], timeout_s=10, clock=_clock(), on_lag=on_lag
        )
        assert lags == [10, 6, 2, 0]

    asyncio.run(test())


def test_a_group_that_does_not_move_is_not_waited_for_for_ever() -> None:
    async def test() -> None:
        broker = _broker(1)
        broker.append("out", b"x")
        with pytest.raises(ReplayError, match=r"group readers is behind \(lag 1\) and has committed nothing for 0 s"):
            await wait_for_groups(
                broker.admin(), ["readers"], [("out", 0)], timeout_s=0, clock=_clock(), on_lag=lambda _: None
            )

    asyncio.run(test())


def test_a_run_id_says_when_it_began() -> None:
    assert make_run_id(0, random.Random(1)).startswith("replay-19700101T000000-")
    assert make_run_id(0, random.Random(1)) != make_run_id(0, random.Random(2))
