"""The three orders: what may be written when, and that nothing is lost or written twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from streamproc.records import Lease, Outcome, Span
from streamproc.runtime.sequencer import KeyOrder, PartitionOrder, Unordered, make_sequencer
from tests.support.spans import lease, outcome, span


def offsets(outcomes: list[Outcome]) -> list[int]:
    return [record.offset for it in outcomes for record in it.span.records]


def test_partition_order_holds_back_what_comes_too_early() -> None:
    sequencer, one = PartitionOrder(), lease()
    first, second, third = span(one, 0, 2), span(one, 2, 2), span(one, 4, 1)
    for it in (first, second, third):
        sequencer.expect(it)
    assert sequencer.complete(outcome(third)) == []
    assert sequencer.complete(outcome(second)) == []
    assert offsets(sequencer.complete(outcome(first))) == [100, 101, 102, 103, 104]


def test_partitions_do_not_wait_for_each_other() -> None:
    sequencer = PartitionOrder()
    slow, quick = span(lease(0), 0, 1), span(lease(1), 0, 1)
    sequencer.expect(slow)
    sequencer.expect(quick)
    assert offsets(sequencer.complete(outcome(quick))) == [100]


def test_key_order_lets_other_keys_pass() -> None:
    sequencer, one = KeyOrder(), lease()
    first = span(one, 0, 2, keys=[b"a", b"b"])
    second = span(one, 2, 2, keys=[b"c", b"a"])
    sequencer.expect(first)
    sequencer.expect(second)
    assert offsets(sequencer.complete(outcome(second))) == [102]
    assert offsets(sequencer.complete(outcome(first))) == [100, 103, 101]


def test_unordered_holds_nothing_back() -> None:
    sequencer, one = Unordered(), lease()
    late = span(one, 4, 1)
    assert offsets(sequencer.complete(outcome(late))) == [104]


@pytest.mark.parametrize("ordering", ["partition", "key"])
def test_outcomes_of_a_forgotten_lease_are_dropped(ordering: str) -> None:
    sequencer, one = make_sequencer(ordering), lease()
    first, second = span(one, 0, 1), span(one, 1, 1)
    sequencer.expect(first)
    sequencer.expect(second)
    sequencer.forget([one])
    assert sequencer.complete(outcome(first)) == []
    assert sequencer.complete(outcome(second)) == []


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="no such ordering"):
        make_sequencer("sorted")


PARTITIONS = 2
KEYS = [b"a", b"b", None]
Scope = Callable[[int, bytes | None], object]


@dataclass
class Modelled:
    """What the model knows of a lease: keys by sequence number, what is outstanding, done and released."""

    lease: Lease
    keys: list[bytes | None] = field(default_factory=list)
    outstanding: list[Span] = field(default_factory=list)
    completed: list[Span] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    released: list[int] = field(default_factory=list)


class SequencerAgainstModel(RuleBasedStateMachine):
    """Reading, splitting, completing in any order, and partitions that move, against a sequencer that counts anew.

    A record may be released when every record before it in its ``scope`` is done.
    """

    ordering: str
    scope: Scope

    def __init__(self) -> None:
        super().__init__()
        self.sequencer = make_sequencer(self.ordering)
        self.leases = [Modelled(lease(partition)) for partition in range(PARTITIONS)]
        self.ended: list[Span] = []

    @rule(partition=st.integers(0, PARTITIONS - 1), keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=5))
    def read(self, partition: int, keys: list[bytes | None]) -> None:
        known = self.leases[partition]
        new = span(known.lease, len(known.keys), len(keys), keys=keys)
        self.sequencer.expect(new)
        known.keys += keys
        known.outstanding.append(new)

    @precondition(lambda self: self.splittable())
    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        """As batches and isolation cut spans, down to single records."""
        known, it = data.draw(st.sampled_from(self.splittable()))
        known.outstanding.remove(it)
        known.outstanding += it.split(data.draw(st.integers(1, len(it.records) - 1)))

    @precondition(lambda self: any(known.outstanding for known in self.leases))
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        known = data.draw(st.sampled_from([known for known in self.leases if known.outstanding]))
        it = data.draw(st.sampled_from(known.outstanding))
        known.outstanding.remove(it)
        self.finish(known, it)

    @precondition(lambda self: self.ordering != "unordered" and any(known.completed for known in self.leases))
    @rule(data=st.data())
    def complete_again(self, data: st.DataObject) -> None:
        """Orders that remember what they have released do not release it twice."""
        known = data.draw(st.sampled_from([known for known in self.leases if known.completed]))
        assert self.sequencer.complete(outcome(data.draw(st.sampled_from(known.completed)))) == []

    @rule(partitions=st.sets(st.integers(0, PARTITIONS - 1)))
    def move(self, partitions: set[int]) -> None:
        """Leases end, with outcomes outstanding and held, and others of the same partitions begin."""
        self.sequencer.forget([self.leases[partition].lease for partition in partitions])
        for partition in partitions:
            known = self.leases[partition]
            self.ended += known.outstanding
            self.leases[partition] = Modelled(lease(partition, known.lease.epoch + 1))

    @precondition(lambda self: self.ordering != "unordered" and self.ended)
    @rule(data=st.data())
    def complete_late(self, data: st.DataObject) -> None:
        assert self.sequencer.complete(outcome(data.draw(st.sampled_from(self.ended)))) == []

    def splittable(self) -> list[tuple[Modelled, Span]]:
        return [(known, it) for known in self.leases for it in known.outstanding if len(it.records) > 1]

    def finish(self, known: Modelled, it: Span) -> None:
        """Complete a span, and compare what comes with what may come now."""
        it.output_bytes = 2 * len(it.records)
        known.completed.append(it)
        known.done |= set(range(it.first, it.stop))
        fresh: list[int] = []
        for released in self.sequencer.complete(outcome(it)):
            assert released.span.lease is known.lease
            assert len(released.statuses) == len(released.values) == len(released.span.records)
            assert released.span.output_bytes == 2 * len(released.span.records)
            numbers = range(released.span.first, released.span.stop)
            assert [record.offset - 100 for record in released.span.records] == list(numbers)
            fresh += numbers
        known.released += fresh
        assert len(set(known.released)) == len(known.released), "released twice"
        assert set(known.released) == {number for number in known.done if self.may_go(known, number)}
        for scope in {self.scope(number, key) for number, key in enumerate(known.keys)}:
            order = [number for number in known.released if self.scope(number, known.keys[number]) == scope]
            assert order == sorted(order), "released out of order"

    def may_go(self, known: Modelled, number: int) -> bool:
        scope = self.scope(number, known.keys[number])
        return all(
            other in known.done for other, key in enumerate(known.keys[:number]) if self.scope(other, key) == scope
        )

    def teardown(self) -> None:
        """Once everything is complete nothing is left, and nothing is remembered."""
        for known in self.leases:
            for it in known.outstanding:
                self.finish(known, it)
            assert sorted(known.released) == list(range(len(known.keys)))
        if isinstance(self.sequencer, PartitionOrder):
            assert not any(held.waiting for held in self.sequencer._held.values())
        elif isinstance(self.sequencer, KeyOrder):
            assert not any(self.sequencer._queues.values())
            assert not any(self.sequencer._waiting.values())


class PartitionOrderAgainstModel(SequencerAgainstModel):
    """Everything before it in its partition."""

    ordering = "partition"
    scope = staticmethod(lambda number, key: None)  # noqa: ARG005 - one scope for all


class KeyOrderAgainstModel(SequencerAgainstModel):
    """Everything before it with its key, or without one."""

    ordering = "key"
    scope = staticmethod(lambda number, key: key)  # noqa: ARG005 - the key alone


class UnorderedAgainstModel(SequencerAgainstModel):
    """Nothing."""

    ordering = "unordered"
    scope = staticmethod(lambda number, key: number)  # noqa: ARG005 - each for itself


TestPartitionOrderAgainstModel = PartitionOrderAgainstModel.TestCase
TestKeyOrderAgainstModel = KeyOrderAgainstModel.TestCase
TestUnorderedAgainstModel = UnorderedAgainstModel.TestCase
MODEL = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPartitionOrderAgainstModel.settings = TestKeyOrderAgainstModel.settings = MODEL
TestUnorderedAgainstModel.settings = MODEL


def test_a_key_that_waits_keeps_no_other_value_in_memory() -> None:
    sequencer, one = KeyOrder(), lease()
    first, second = span(one, 0, 1, keys=[b"a"]), span(one, 1, 2, keys=[b"a", b"b"])
    sequencer.expect(first)
    sequencer.expect(second)
    body = memoryview(b"12" + b"x" * 1_000)
    held = outcome(second)
    held.values = [body[:2], body[2:]]
    (released,) = sequencer.complete(held)
    assert released.values == [b"x" * 1_000]
    (_, waited) = sequencer.complete(outcome(first))
    assert waited.values == [b"12"]
    assert isinstance(waited.values[0], bytes), "a view would keep all of the body"
