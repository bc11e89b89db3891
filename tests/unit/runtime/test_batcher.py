"""When a window closes, and what is in the batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamproc.records import Batch, Lease
from streamproc.runtime.batcher import Batcher
from streamproc.settings import BatchSettings
from tests.support.spans import lease, span


def batcher(**limits: float) -> Batcher:
    return Batcher("text", BatchSettings.model_validate(limits), itertools.count(1).__next__)


def offsets(it: Batch) -> list[int]:
    return [record.offset for part in it.spans for record in part.records]


def test_an_empty_batcher_is_never_due() -> None:
    it = batcher(max_size=1, max_wait_ms=0)
    assert it.due(100.0, backlog=True) is None
    assert it.deadline is None
    assert it.opened_at is None


def test_a_window_closes_by_size() -> None:
    it = batcher(max_size=4)
    it.add(span(lease(), 0, 3))
    assert it.full() is None
    it.add(span(lease(), 3, 3))
    assert it.full() == "size"
    taken = it.take(0.0, "size")
    assert offsets(taken) == [100, 101, 102, 103]
    assert taken.fill == 1.0
    assert it.size == 2


def test_a_window_closes_by_bytes() -> None:
    it = batcher(max_size=100, max_bytes=10)
    it.add(span(lease(), 0, 4, value=b"1234"))
    assert it.full() == "bytes"
    assert offsets(it.take(0.0, "bytes")) == [100, 101]
    assert it.size_bytes == 8


def test_a_record_larger_than_a_batch_runs_alone() -> None:
    it = batcher(max_size=100, max_bytes=10)
    it.add(span(lease(), 0, 1, value=b"12"))
    it.add(span(lease(), 1, 1, value=b"x" * 50))
    it.add(span(lease(), 2, 1, value=b"12"))
    assert [offsets(it.take(0.0, "bytes")) for _ in range(3)] == [[100], [101], [102]]


def test_a_window_closes_when_its_oldest_record_has_waited_long_enough() -> None:
    it = batcher(max_size=100, max_wait_ms=20)
    it.add(span(lease(), 0, 1, arrived_at=5.0))
    it.add(span(lease(), 1, 1, arrived_at=5.015))
    assert it.deadline == 5.02
    assert it.due(5.019, backlog=False) is None
    assert it.due(5.02, backlog=False) == "wait"
    assert it.take(5.02, "wait").opened_at == 5.0


def test_the_rest_of_a_span_keeps_its_own_arrival() -> None:
    it = batcher(max_size=2, max_wait_ms=20)
    it.add(span(lease(), 0, 3, arrived_at=1.0))
    it.take(1.0, "size")
    assert it.deadline == 1.02


def test_with_backlog_nothing_waits() -> None:
    it = batcher(max_size=100, max_wait_ms=20)
    it.add(span(lease(), 0, 1, arrived_at=5.0))
    assert it.due(5.0, backlog=True) == "backlog"


def test_discarding_gives_back_the_records_of_the_leases_asked_for() -> None:
    it = batcher(max_size=100)
    gone, stays = lease(0), lease(1)
    it.add(span(gone, 0, 2))
    it.add(span(stays, 0, 3))
    it.add(span(gone, 2, 1))
    assert [len(part.records) for part in it.discard({gone})] == [2, 1]
    assert (it.size, it.size_bytes) == (3, 6)
    assert [len(part.records) for part in it.discard()] == [3]
    assert (it.size, it.size_bytes) == (0, 0)


@dataclass
class Waiting:
    """A record that the model knows to wait."""

    lease: Lease
    sequence: int
    size: int
    arrived_at: float


class BatcherAgainstModel(RuleBasedStateMachine):
    """Records that come, batches that go, partitions that are given back, against a list of records."""

    @initialize(max_size=st.integers(1, 12), max_bytes=st.integers(1, 40), max_wait_ms=st.integers(0, 50))
    def begin(self, max_size: int, max_bytes: int, max_wait_ms: int) -> None:
        self.max_size, self.max_bytes, self.max_wait_ms = max_size, max_bytes, max_wait_ms
        self.batcher = batcher(max_size=max_size, max_bytes=max_bytes, max_wait_ms=max_wait_ms)
        self.leases = [lease(partition) for partition in range(3)]
        self.read = dict.fromkeys(self.leases, 0)
        self.waiting: list[Waiting] = []
        self.ids: set[int] = set()
        self.now = 100.0

    @rule(number=st.integers(0, 2), sizes=st.lists(st.integers(0, 25), min_size=1, max_size=8))
    def add(self, number: int, sizes: list[int]) -> None:
        it = self.leases[number]
        first = self.read[it]
        self.batcher.add(span(it, first, len(sizes), values=[b"x" * size for size in sizes], arrived_at=self.now))
        self.waiting += [Waiting(it, first + index, size, self.now) for index, size in enumerate(sizes)]
        self.read[it] += len(sizes)

    @rule(ms=st.integers(0, 30))
    def wait(self, ms: int) -> None:
        self.now += ms / 1_000

    @precondition(lambda self: self.waiting)
    @rule(rule_name=st.sampled_from(["size", "bytes", "wait", "backlog"]))
    def take(self, rule_name: str) -> None:
        """The oldest records, as many as size and bytes allow, one at least."""
        count, size_bytes = 0, 0
        while count < min(len(self.waiting), self.max_size):
            size_bytes += self.waiting[count].size
            if count and size_bytes > self.max_bytes:
                break
            count += 1
        expected, self.waiting = self.waiting[:count], self.waiting[count:]
        batch = self.batcher.take(self.now, rule_name)
        taken = [
            (part.lease, part.first + index, size, part.arrived_at)
            for part in batch.spans
            for index, size in enumerate(part.sizes)
        ]
        assert taken == [(it.lease, it.sequence, it.size, it.arrived_at) for it in expected]
        assert (batch.size, batch.size_bytes) == (count, sum(it.size for it in expected))
        assert (batch.opened_at, batch.closed_at) == (expected[0].arrived_at, self.now)
        assert (batch.closed_by, batch.fill) == (rule_name, count / self.max_size)
        assert batch.id not in self.ids
        self.ids.add(batch.id)

    @rule(numbers=st.one_of(st.none(), st.sets(st.integers(0, 2))))
    def discard(self, numbers: set[int] | None) -> None:
        """Give back some leases, or everything; other leases of the same partitions follow."""
        gone = set(self.leases) if numbers is None else {self.leases[number] for number in numbers}
        given = self.batcher.discard(None if numbers is None else gone)
        assert [(it.lease, it.first + index) for it in given for index in range(len(it.records))] == [
            (it.lease, it.sequence) for it in self.waiting if it.lease in gone
        ]
        self.waiting = [it for it in self.waiting if it.lease not in gone]
        for number in numbers or ():
            self.leases[number] = lease(number, self.leases[number].epoch + 1)
            self.read[self.leases[number]] = 0

    @invariant()
    def the_books_are_right(self) -> None:
        assert (self.batcher.size, self.batcher.size_bytes) == (
            len(self.waiting),
            sum(it.size for it in self.waiting),
        )

    @invariant()
    def windows_close_by_the_rules(self) -> None:
        opened = self.waiting[0].arrived_at if self.waiting else None
        deadline = None if opened is None else opened + self.max_wait_ms / 1_000
        assert (self.batcher.opened_at, self.batcher.deadline) == (opened, deadline)
        full = None
        if len(self.waiting) >= self.max_size:
            full = "size"
        elif sum(it.size for it in self.waiting) >= self.max_bytes:
            full = "bytes"
        assert self.batcher.full() == full
        late = deadline is not None and self.now >= deadline
        rule = full or ("wait" if late else None)
        assert self.batcher.due(self.now, backlog=False) == rule
        assert self.batcher.due(self.now, backlog=True) == (rule or ("backlog" if self.waiting else None))


TestBatcherAgainstModel = BatcherAgainstModel.TestCase
TestBatcherAgainstModel.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
