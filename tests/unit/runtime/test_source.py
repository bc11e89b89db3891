"""Whose turn it is to be read when little room is left: the shares against a model, and the source that obeys them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamproc.records import Record, TopicPartition
from streamproc.runtime.source import MAX_POLL_RECORDS, Load, Room, Source
from tests.support.polling import HandConsumer
from tests.support.spans import FakeRecord

PLENTY = 2**40


def at(number: int) -> TopicPartition:
    return TopicPartition("in", number)


def looked_at(room: Room, loads: dict[int, tuple[int, int]]) -> set[int]:
    """The numbers of the partitions that are not to be read with these loads."""
    records, size_bytes = sum(it[0] for it in loads.values()), sum(it[1] for it in loads.values())
    return {it.partition for it in room.look(records, size_bytes, lambda: [(at(n), *it) for n, it in loads.items()])}


def test_with_plenty_of_room_no_partition_is_looked_at() -> None:
    room = Room(1_000, PLENTY)
    room.divide(4)

    def never() -> list[Load]:
        raise AssertionError

    assert room.look(250, 0, never) == set()
    assert room.wanted(1) == 250


def test_a_stuck_partition_leaves_the_others_their_shares() -> None:
    room = Room(80, PLENTY)
    room.divide(4)
    assert looked_at(room, {0: (50, 0), 1: (0, 0), 2: (5, 0), 3: (6, 0)}) == {0, 3}
    assert room.wanted(1) == 5


def test_the_shared_half_is_opened_again_when_a_quarter_of_it_is_free() -> None:
    room = Room(80, PLENTY)
    room.divide(4)
    full = {0: (50, 0), 1: (10, 0), 2: (10, 0), 3: (10, 0)}
    assert looked_at(room, full) == {0, 1, 2, 3}
    assert looked_at(room, full | {0: (41, 0)}) == {0, 1, 2, 3}
    assert looked_at(room, full | {0: (40, 0)}) == set()


def test_with_one_partition_a_poll_that_is_out_fits_what_is_opened_behind_its_back() -> None:
    room = Room(8, PLENTY)
    assert looked_at(room, {0: (8, 0)}) == {0}
    wanted = room.wanted(1)
    opened = next(it for it in range(7, -1, -1) if looked_at(room, {0: (it, 0)}) == set())
    assert opened + wanted == 8


def test_one_large_value_is_taken_whatever_the_limit() -> None:
    room = Room(100, 10)
    room.divide(3)
    assert looked_at(room, {0: (0, 0), 1: (0, 0), 2: (0, 0)}) == set()
    assert room.wanted(1_000_000) == 1
    assert looked_at(room, {0: (1, 1_000_000), 1: (0, 0), 2: (0, 0)}) == {0, 1, 2}


@pytest.mark.parametrize("records", [1, 2, 3, 7])
def test_a_limit_with_less_than_two_records_a_partition_is_shared_by_all(records: int) -> None:
    room = Room(records, PLENTY)
    room.divide(4)
    assert looked_at(room, {0: (records, 0), 1: (0, 0), 2: (0, 0), 3: (0, 0)}) == {0, 1, 2, 3}
    assert looked_at(room, {0: (0, 0), 1: (0, 0), 2: (0, 0), 3: (0, 0)}) == set()
    assert room.wanted(1) == min(records, MAX_POLL_RECORDS)


class RoomAgainstModel(RuleBasedStateMachine):
    """Any reading that the room allows, and any settling, with shares counted anew from the rule's own words."""

    @initialize(
        max_records=st.integers(1, 200),
        max_bytes=st.integers(1, 2_000),
        partitions=st.integers(1, 6),
        values=st.integers(1, 60),
    )
    def begin(self, max_records: int, max_bytes: int, partitions: int, values: int) -> None:
        self.limits = (max_records, max_bytes)
        self.largest_value = values
        self.room = Room(*self.limits)
        self.divide(partitions)

    @rule(partitions=st.integers(1, 6))
    def divide(self, partitions: int) -> None:
        """A rebalance: everything is read anew."""
        self.room.divide(partitions)
        self.outstanding: dict[int, list[int]] = {number: [] for number in range(partitions)}
        self.shares = [limit // 2 // partitions for limit in self.limits]
        self.ask()

    @rule()
    def ask(self) -> None:
        """Before a poll."""
        self.look()
        self.wanted = self.room.wanted(self.largest_value)
        assert 1 <= self.wanted <= MAX_POLL_RECORDS

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """One poll brings what it may, of whichever partitions are open by now."""
        before, left, brought = self.bytes(), self.wanted, 0
        for number in data.draw(st.permutations(sorted(set(self.outstanding) - self.closed))):
            sizes = data.draw(st.lists(st.integers(0, self.largest_value), max_size=min(left, 12)))
            if data.draw(st.booleans()):
                sizes += [self.largest_value] * (left - len(sizes))
            self.outstanding[number] += sizes
            left -= len(sizes)
            brought += len(sizes)
        assert not brought or before < self.limits[1]
        if brought > 1:
            assert self.bytes() <= self.limits[1]
        self.ask()

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        """Something is settled, and the room is asked again where that may matter; the poll that is out stays."""
        number = data.draw(st.sampled_from(sorted(self.outstanding)))
        del self.outstanding[number][: data.draw(st.integers(0, len(self.outstanding[number])))]
        if self.closed and self.room.eased(self.records(), self.bytes()):
            self.look()

    @precondition(lambda self: self.closed)
    @rule()
    def settle_everything(self) -> None:
        """Nobody waits for a poll to find that there is room again."""
        for sizes in self.outstanding.values():
            sizes.clear()
        assert self.room.eased(0, 0)
        self.look()
        assert not self.closed

    def look(self) -> None:
        loads = {number: (len(sizes), sum(sizes)) for number, sizes in self.outstanding.items()}
        self.closed = looked_at(self.room, loads)
        assert not self.closed or any(any(load) for load in loads.values())
        for number, load in loads.items():
            small = all(2 * used < share for used, share in zip(load, self.shares, strict=True))
            assert number not in self.closed or not small or self.bytes() >= self.limits[1]

    def records(self) -> int:
        return sum(map(len, self.outstanding.values()))

    def bytes(self) -> int:
        return sum(map(sum, self.outstanding.values()))

    @invariant()
    def the_records_are_never_more_than_the_limit(self) -> None:
        assert self.records() <= self.limits[0]

    @invariant()
    def what_is_beyond_the_shares_fits_the_shared_half(self) -> None:
        beyond = sum(max(len(sizes) - self.shares[0], 0) for sizes in self.outstanding.values())
        assert beyond <= self.limits[0] - self.shares[0] * len(self.outstanding)


TestRoomAgainstModel = RoomAgainstModel.TestCase
TestRoomAgainstModel.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


class Reading:
    """A source over polls that are answered by hand."""

    def __init__(self, room: Room, partitions: int) -> None:
        self.consumer = HandConsumer()
        self.loads: dict[TopicPartition, list[int]] = {at(number): [0, 0] for number in range(partitions)}
        self.read: list[tuple[TopicPartition, int]] = []
        self.told: list[bool] = []
        self.source = Source(
            self.consumer,  # type: ignore[arg-type] # what the source uses of it
            room,
            lambda: (sum(it[0] for it in self.loads.values()), sum(it[1] for it in self.loads.values())),
            lambda: [(partition, it[0], it[1]) for partition, it in self.loads.items()],
            on_records=self.on_records,
            on_pause=self.told.append,
        )
        self.source.assigned(set(self.loads))
        self.consumer.run(self.source.run())

    def on_records(self, partition: TopicPartition, records: Sequence[Record]) -> int:
        self.read.append((partition, len(records)))
        self.loads[partition][0] += len(records)
        self.loads[partition][1] += sum(len(it.value or b"") for it in records)
        return max(len(it.value or b"") for it in records)

    def answer(self, **counts: int) -> None:
        """Answer the poll; ``p1=3`` is three records of partition 1."""
        self.consumer.answer(
            {at(int(name[1:])): [FakeRecord(0, value=b"12")] * count for name, count in counts.items()}
        )


@pytest.fixture
def reading() -> Iterator[Callable[..., Reading]]:
    made: list[Reading] = []

    def make(max_records: int = 80, max_bytes: int = PLENTY, partitions: int = 4) -> Reading:
        made.append(Reading(Room(max_records, max_bytes), partitions))
        return made[-1]

    yield make
    for it in made:
        it.consumer.close()


def test_the_partition_that_fills_the_room_is_paused_and_the_others_are_read(
    reading: Callable[..., Reading],
) -> None:
    it = reading()
    it.answer(p0=40)
    it.answer(p0=10)
    assert it.source.paused == it.consumer.paused == {at(0)}
    assert it.told == [True]
    it.answer(p1=5)
    assert it.consumer.wanted == 5
    assert it.source.paused == {at(0)}


def test_settling_resumes_without_waiting_for_a_poll(reading: Callable[..., Reading]) -> None:
    it = reading()
    it.answer(p0=40)
    it.answer(p0=10)
    it.loads[at(0)][0] = 49
    it.source.relieved()
    assert it.consumer.paused == {at(0)}, "one record is not worth a look"
    it.loads[at(0)][0] = 40
    it.source.relieved()
    assert it.consumer.paused == set()
    assert it.told == [True, False]


def test_a_revoked_partition_is_not_resumed_and_a_new_assignment_is_read(reading: Callable[..., Reading]) -> None:
    it = reading()
    it.answer(p0=40)
    it.answer(p0=10)
    it.source.revoked(set(it.loads))
    it.consumer.paused.clear()  # as the client forgets it
    it.answer()
    assert it.source.paused == set()
    for load in it.loads.values():
        load[0] = 0
    it.source.assigned({at(0), at(1)})
    it.answer()
    it.answer(p0=1)
    assert it.read[-1] == (at(0), 1)


def test_nothing_is_handed_over_after_a_stop(reading: Callable[..., Reading]) -> None:
    it = reading()
    it.source.stop()
    assert it.consumer.paused == set(it.loads)
    it.consumer.paused.clear()  # what was on its way comes all the same
    it.answer(p0=3)
    it.source.relieved()
    it.answer(p1=3)
    assert it.read == []


def test_one_large_value_does_not_make_polls_small_for_ever(reading: Callable[..., Reading]) -> None:
    it = reading(100_000, 10_000_000, 2)
    it.consumer.answer({at(0): [FakeRecord(0, value=b"x" * 2_000_000)]})
    it.loads[at(0)] = [0, 0]
    it.answer(p1=1)
    assert it.consumer.wanted == 2, "the next value may be as large"
    for _ in range(150):
        it.loads[at(1)] = [0, 0]
        it.answer(p1=1)
    assert it.consumer.wanted == MAX_POLL_RECORDS
