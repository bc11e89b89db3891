"""The ledger against a brute-force model of offsets: no lost record, no double settlement, no commit too far."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule

from streamproc.records import Lease, Span, TopicPartition
from streamproc.runtime.ledger import Ledger
from tests.support.spans import span

P0, P1 = TopicPartition("in", 0), TopicPartition("in", 1)


def read(ledger: Ledger, of: Lease, count: int) -> Span:
    new = span(of, ledger.next_sequence(of), count)
    ledger.read(new)
    return new


def test_nothing_is_committable_before_something_is_settled() -> None:
    ledger = Ledger()
    (lease,) = ledger.open([P0])
    read(ledger, lease, 3)
    assert ledger.committable() == {}


def test_the_end_of_the_contiguous_settled_run_is_committable_and_no_more() -> None:
    ledger = Ledger()
    (lease,) = ledger.open([P0])
    first, second, third = (read(ledger, lease, 2) for _ in range(3))
    assert ledger.settle(third)
    assert ledger.committable() == {}
    assert ledger.settle(first)
    assert ledger.committable() == {P0: 102}
    assert ledger.settle(second)
    assert ledger.committable() == {P0: 106}


def test_a_committed_offset_is_not_offered_again() -> None:
    ledger = Ledger()
    (lease,) = ledger.open([P0])
    ledger.settle(read(ledger, lease, 2))
    ledger.committed(ledger.committable())
    assert ledger.committable() == {}
    ledger.settle(read(ledger, lease, 1))
    assert ledger.committable() == {P0: 103}


def test_settling_twice_counts_once() -> None:
    ledger = Ledger()
    (lease,) = ledger.open([P0])
    first, second = read(ledger, lease, 2), read(ledger, lease, 2)
    assert ledger.settle(second)
    assert not ledger.settle(second)
    assert ledger.settle(first)
    assert not ledger.settle(first)
    assert ledger.in_flight_records == 0


def test_an_outcome_of_an_earlier_assignment_commits_nothing() -> None:
    ledger = Ledger()
    (old,) = ledger.open([P0])
    late = read(ledger, old, 2)
    ledger.close([P0])
    (new,) = ledger.open([P0])
    assert new.epoch > old.epoch
    assert not ledger.is_live(old)
    assert not ledger.settle(late)
    assert ledger.committable() == {}


def test_a_partition_that_is_assigned_twice_in_a_row_begins_anew() -> None:
    ledger = Ledger()
    (old,) = ledger.open([P0])
    read(ledger, old, 5)
    (new,) = ledger.open([P0])
    assert ledger.in_flight_records == 0
    assert ledger.next_sequence(new) == 0


def test_discarded_records_leave_the_books_and_hold_up_the_offsets_behind_them() -> None:
    ledger = Ledger()
    (lease,) = ledger.open([P0])
    first, second, third = (read(ledger, lease, 1) for _ in range(3))
    ledger.settle(first)
    ledger.discard(second)
    ledger.settle(third)
    assert ledger.in_flight_records == 0
    assert ledger.committable() == {P0: 101}


def test_reading_out_of_order_is_a_bug_and_says_so() -> None:
    ledger = Ledger()
    (lease,) = ledger.open([P0])
    with pytest.raises(AssertionError, match="does not continue"):
        ledger.read(span(lease, 5, 1))


def test_the_oldest_unsettled_timestamp_moves_with_the_settled_run() -> None:
    ledger = Ledger()
    (lease,) = ledger.open([P0])
    first = span(lease, 0, 1)
    second = span(lease, 1, 1)
    first.records[0].timestamp = 10  # type: ignore[misc]  # the fake may be written to
    second.records[0].timestamp = 20  # type: ignore[misc]
    ledger.read(first)
    ledger.read(second)
    assert ledger.partitions()[0].oldest_timestamp == 10
    ledger.settle(first)
    assert ledger.partitions()[0].oldest_timestamp == 20
    ledger.settle(second)
    assert ledger.partitions()[0].oldest_timestamp is None


class LedgerAgainstModel(RuleBasedStateMachine):
    """Any interleaving of reads, splits, settlements, revocations and commits, against sets of offsets."""

    spans = Bundle("spans")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.leases: dict[TopicPartition, Lease] = {}
        self.read_offsets: dict[Lease, list[int]] = {}
        self.settled: dict[Lease, set[int]] = {}
        self.epoch = 0

    @rule(partition=st.sampled_from([P0, P1]))
    def assign(self, partition: TopicPartition) -> None:
        (lease,) = self.ledger.open([partition])
        assert lease.epoch > self.epoch
        self.epoch = lease.epoch
        self.leases[partition] = lease
        self.read_offsets[lease] = []
        self.settled[lease] = set()

    @precondition(lambda self: self.leases)
    @rule(partition=st.sampled_from([P0, P1]))
    def revoke(self, partition: TopicPartition) -> None:
        self.ledger.close([partition])
        self.leases.pop(partition, None)

    @precondition(lambda self: self.leases)
    @rule(target=spans, data=st.data(), count=st.integers(1, 5), cut=st.integers(0, 4))
    def read(self, data: st.DataObject, count: int, cut: int) -> object:
        lease = data.draw(st.sampled_from(sorted(self.leases.values(), key=lambda it: it.partition)))
        new = span(lease, self.ledger.next_sequence(lease), count)
        self.ledger.read(new)
        self.read_offsets[lease].extend(record.offset for record in new.records)
        return multiple(*new.split(cut)) if 0 < cut < count else new

    @rule(it=spans)
    def settle(self, it: Span) -> None:
        live = self.leases.get(it.lease.partition) is it.lease
        offsets = {record.offset for record in it.records}
        counts = live and not offsets <= self.settled[it.lease]
        assert self.ledger.settle(it) == counts
        if live:
            self.settled[it.lease] |= offsets

    @rule()
    def commit(self) -> None:
        self.ledger.committed(self.ledger.committable())
        assert self.ledger.committable() == {}

    @invariant()
    def in_flight_is_what_is_read_and_not_settled(self) -> None:
        expected = sum(len(self.read_offsets[it]) - len(self.settled[it]) for it in self.leases.values())
        assert self.ledger.in_flight_records == expected
        assert self.ledger.in_flight_bytes == 2 * expected

    @invariant()
    def no_offset_is_offered_beyond_an_unsettled_record(self) -> None:
        offered = self.ledger.committable()
        for partition, lease in self.leases.items():
            run = 0
            for offset in self.read_offsets[lease]:
                if offset not in self.settled[lease]:
                    break
                run = offset + 1
            books = next(it for it in self.ledger.partitions() if it.partition == partition)
            assert (books.next_offset or 0) == run
            assert offered.get(partition, books.committed or 0) == run


TestLedgerAgainstModel = LedgerAgainstModel.TestCase
TestLedgerAgainstModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.permutations(range(8)))
@settings(max_examples=60, deadline=None)
def test_whatever_the_order_of_settlement_everything_is_committable_at_the_end(order: list[int]) -> None:
    ledger = Ledger()
    (lease,) = ledger.open([P0])
    spans = [read(ledger, lease, 1 + index % 3) for index in range(8)]
    for index in order:
        assert ledger.settle(spans[index])
    assert ledger.committable() == {P0: spans[-1].next_offset}
    assert ledger.in_flight_records == 0
