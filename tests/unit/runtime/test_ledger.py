"""The ledger against a brute-force model of offsets: no lost record, no double settlement, no commit too far."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule

from streamproc.records import Lease, Span, TopicPartition
from streamproc.runtime.ledger import Ledger
from tests.support.spans import span

P0, P1, P2 = (TopicPartition("in", number) for number in range(3))


def read(ledger: Ledger, of: Lease, count: int) -> Span:
    new = span(of, ledger.next_sequence(of), count)
    ledger.read(new)
    return new


def test_where_a_lease_began_is_committable_before_anything_is_settled() -> None:
    """Or whoever gets the partition next, with ``auto_offset_reset: latest``, would begin behind what is in flight."""
    ledger = Ledger()
    (lease,) = ledger.open([P0])
    assert ledger.committable() == {}
    read(ledger, lease, 3)
    assert ledger.committable() == {P0: 100}


def test_the_end_of_the_contiguous_settled_run_is_committable_and_no_more() -> None:
    ledger = Ledger()
    (lease,) = ledger.open([P0])
    first, second, third = (read(ledger, lease, 2) for _ in range(3))
    assert ledger.settle(third)
    assert ledger.committable() == {P0: 100}
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


def test_what_lies_behind_a_discarded_record_is_not_awaited() -> None:
    ledger = Ledger()
    (lease,) = ledger.open([P0])
    first, second, _ = (read(ledger, lease, 1) for _ in range(3))
    assert ledger.is_awaited([P0])
    ledger.discard(second)
    assert ledger.is_awaited([P0])
    ledger.settle(first)
    assert not ledger.is_awaited([P0])
    assert ledger.in_flight([P0]) == 1


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


@dataclass
class Modelled:
    """What the model knows of a lease: every record by its sequence number."""

    lease: Lease
    offsets: list[int] = field(default_factory=list)
    settled: set[int] = field(default_factory=set)
    discarded: set[int] = field(default_factory=set)
    results: dict[int, int] = field(default_factory=dict)
    committed: int | None = None

    @property
    def in_flight(self) -> set[int]:
        return set(range(len(self.offsets))) - self.settled - self.discarded

    @property
    def run(self) -> int:
        return next((it for it in range(len(self.offsets)) if it not in self.settled), len(self.offsets))

    @property
    def committable(self) -> int | None:
        if self.run:
            return self.offsets[self.run - 1] + 1
        return self.offsets[0] if self.offsets else None


class LedgerAgainstModel(RuleBasedStateMachine):
    """Any interleaving of reads, splits, results, settlements, revocations and commits, against sets of records."""

    spans = Bundle("spans")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.leases: dict[TopicPartition, Modelled] = {}
        self.asked: list[dict[TopicPartition, int]] = []
        self.epoch = 0

    def modelled(self, it: Span) -> Modelled | None:
        """The model of a span's lease while that lives."""
        found = self.leases.get(it.lease.partition)
        return found if found is not None and found.lease is it.lease else None

    @rule(partitions=st.sets(st.sampled_from([P0, P1, P2]), min_size=1))
    def assign(self, partitions: set[TopicPartition]) -> None:
        """New leases, also of partitions that are still assigned."""
        leases = self.ledger.open(sorted(partitions))
        assert {lease.partition for lease in leases} == partitions
        assert {lease.epoch for lease in leases} == {self.epoch + 1}
        self.epoch += 1
        for lease in leases:
            self.leases[lease.partition] = Modelled(lease)

    @rule(partitions=st.sets(st.sampled_from([P0, P1, P2])))
    def revoke(self, partitions: set[TopicPartition]) -> None:
        self.ledger.close(partitions)
        for partition in partitions:
            self.leases.pop(partition, None)

    @precondition(lambda self: self.leases)
    @rule(target=spans, data=st.data(), gaps=st.lists(st.integers(0, 3), min_size=1, max_size=6), cut=st.integers(0, 5))
    def read(self, data: st.DataObject, gaps: list[int], cut: int) -> object:
        """Records with gaps between their offsets; some spans are split as batches split them."""
        known = data.draw(st.sampled_from(sorted(self.leases.values(), key=lambda it: it.lease.partition)))
        new = span(known.lease, self.ledger.next_sequence(known.lease), len(gaps))
        offset = known.offsets[-1] + 1 if known.offsets else 100
        for record, gap in zip(new.records, gaps, strict=True):
            record.offset = offset + gap  # type: ignore[misc]  # the fake may be written to
            offset = record.offset + 1
        self.ledger.read(new)
        known.offsets.extend(record.offset for record in new.records)
        return multiple(*new.split(cut)) if 0 < cut < len(gaps) else new

    @rule(it=spans, size_bytes=st.integers(0, 50))
    def produce(self, it: Span, size_bytes: int) -> None:
        """The results of a span come; late and for a second time too."""
        known = self.modelled(it)
        if known is not None and it.first in known.discarded:
            return
        self.ledger.produced(it, size_bytes)
        if known is not None and it.first in known.in_flight:
            known.results[it.first] = size_bytes

    @rule(it=spans)
    def settle(self, it: Span) -> None:
        """A span is acknowledged; late and for a second time too."""
        known = self.modelled(it)
        if known is not None and it.first in known.discarded:
            return  # it was given back, so nobody answers for it
        counts = known is not None and it.first not in known.settled
        assert self.ledger.settle(it) == counts
        if known is not None:
            known.settled |= set(range(it.first, it.stop))
            known.results.pop(it.first, None)

    @rule(it=spans)
    def discard(self, it: Span) -> None:
        """A span is given back without an outcome: once, if it is in flight."""
        known = self.modelled(it)
        if known is None:
            self.ledger.discard(it)
        elif it.first in known.in_flight:
            self.ledger.discard(it)
            known.discarded |= set(range(it.first, it.stop))
            known.results.pop(it.first, None)

    @rule()
    def begin_commit(self) -> None:
        self.asked.append(self.ledger.committable())

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def end_commit(self, data: st.DataObject) -> None:
        """The broker's answer to an earlier commit, while more was settled, or partitions moved."""
        offsets = self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1)))
        self.ledger.committed(offsets)
        for partition, offset in offsets.items():
            known = self.leases.get(partition)
            if known is not None and known.committable is not None and offset <= known.committable:
                known.committed = offset

    @invariant()
    def only_what_comes_before_everything_discarded_is_awaited(self) -> None:
        for partition, known in self.leases.items():
            before = min(known.discarded, default=len(known.offsets))
            assert self.ledger.is_awaited([partition]) == any(it < before for it in known.in_flight)

    @invariant()
    def in_flight_is_what_is_read_and_neither_settled_nor_given_back(self) -> None:
        known = list(self.leases.values())
        assert self.ledger.in_flight_records == sum(len(it.in_flight) for it in known)
        assert self.ledger.output_bytes == sum(sum(it.results.values()) for it in known)
        assert self.ledger.in_flight_bytes == 2 * self.ledger.in_flight_records + self.ledger.output_bytes
        assert self.ledger.outstanding_records == sum(len(it.offsets) - it.run for it in known)
        assert {partition: (records, size) for partition, records, size in self.ledger.loads()} == {
            partition: (len(it.offsets) - it.run, 2 * len(it.in_flight) + sum(it.results.values()))
            for partition, it in self.leases.items()
        }
        for partition, it in self.leases.items():
            assert self.ledger.in_flight([partition]) == len(it.in_flight)

    @invariant()
    def no_offset_is_offered_beyond_an_unsettled_record(self) -> None:
        assert self.ledger.committable() == {
            partition: it.committable
            for partition, it in self.leases.items()
            if it.committable is not None and it.committable != it.committed
        }

    @invariant()
    def what_is_kept_of_settled_records_is_no_more_than_the_gaps_before_them(self) -> None:
        for partition, it in self.leases.items():
            beyond = sorted(number for number in it.settled if number >= it.run)
            runs = sum(1 for number in beyond if number - 1 not in it.settled)
            assert len(self.ledger._partitions[partition].out_of_order) == runs


TestLedgerAgainstModel = LedgerAgainstModel.TestCase
TestLedgerAgainstModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


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
