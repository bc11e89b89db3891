"""When a window closes, and what is in the batch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamproc.records import Batch, Cause, Lease, Span
from streamproc.runtime.batcher import Batcher
from streamproc.runtime.cost import CostModel
from streamproc.runtime.online_cost import GUESS, OnlineCost
from streamproc.settings import BatchSettings
from tests.support.spans import lease, span


def batcher(**limits: object) -> Batcher:
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


def test_without_batching_each_record_goes_alone_and_at_once() -> None:
    it = batcher(strategy="none", max_size=64)
    it.add(span(lease(), 0, 3))
    taken = []
    while (rule_name := it.full()) is not None:
        taken.append(it.take(0.0, rule_name))
    assert [offsets(one) for one in taken] == [[100], [101], [102]]
    assert {(one.closed_by, one.fill) for one in taken} == {("size", 1.0)}


# -- where records have lengths

MODEL = CostModel(alpha_ms=5.0, beta_ms=0.02, gamma_ms=0.002, delta_ms=2e-6, a_bytes=100, c_bytes=1)
STRATEGIES = ["fifo", "bucketed", "exact"]


def measured(*, memory: float | None = None, **limits: object) -> Batcher:
    return Batcher(
        "text",
        BatchSettings.model_validate({"length": "bytes", **limits}),
        itertools.count(1).__next__,
        cost=OnlineCost(MODEL, calibrated=True),
        memory_budget_bytes=memory,
    )


def of_lengths(first: int, lengths: list[int], *, arrived_at: float = 0.0) -> Span:
    it = span(LEASE, first, len(lengths), arrived_at=arrived_at)
    return Span(it.lease, it.first, it.records, it.sizes, it.arrived_at, lengths)


LEASE = lease()


def test_a_batch_says_what_it_is_padded_to_and_what_was_predicted() -> None:
    it = measured(strategy="fifo")
    it.add(of_lengths(0, [100, 50, 10]))
    taken = it.take(0.0, "wait")
    assert (taken.longest, taken.padding_ratio) == (100, 300 / 160)
    assert taken.predicted_ms == pytest.approx(MODEL.time_ms(3, 100))
    assert taken.predicted_bytes == 100 + 3 * 100


def test_without_lengths_a_batch_has_neither_padding_nor_prediction() -> None:
    it = batcher()
    it.add(span(lease(), 0, 3))
    taken = it.take(0.0, "wait")
    assert (taken.longest, taken.padding_ratio, taken.predicted_ms, taken.predicted_bytes) == (None,) * 4


def test_a_split_batch_knows_the_padding_of_its_parts() -> None:
    it = measured(strategy="fifo")
    it.add(of_lengths(0, [100, 10]))
    taken = it.take(0.0, "wait")
    taken.restrict(taken.parts()[1])
    assert (taken.longest, taken.padding_ratio) == (10, 1.0)


def test_records_of_no_length_need_no_padding() -> None:
    it = measured()
    it.add(of_lengths(0, [0, 0]))
    assert it.take(0.0, "wait").padding_ratio == 1.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_runs_out_first_limits_a_batch(strategy: str) -> None:
    for lengths, it, size in (
        ([10] * 8, measured(strategy=strategy, max_size=4), 4),
        ([10] * 10, measured(strategy=strategy, max_padded=50), 5),
        ([10] * 12, measured(strategy=strategy, memory=160), 6),
        ([80, 80], measured(strategy=strategy, max_padded=50), 1),
    ):
        it.add(of_lengths(0, lengths))
        assert it.take(0.0, "wait").size == size


def test_a_window_closes_by_padded_length_and_by_memory() -> None:
    for it, rule_name in ((measured(max_padded=50), "padding"), (measured(memory=160), "memory")):
        it.add(of_lengths(0, [10] * 6))
        assert it.full() == rule_name


@pytest.mark.parametrize("strategy", [it for it in STRATEGIES if it != "fifo"])
def test_behind_a_busy_worker_a_batch_is_queued_once_some_others_wait_behind_it(strategy: str) -> None:
    """A worker that has nothing queued stands still from its answer until the next batch is there."""
    it = measured(strategy=strategy, max_size=10, max_padded=None)
    lengths = [50 * 2**power for power in range(8)] * 5
    it.add(of_lengths(0, lengths[:39]))
    assert it.full() is None
    it.add(of_lengths(39, lengths[39:]))
    assert it.full() == "size"
    assert it.take(0.0, "size").size
    assert it.full() is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_free_worker_gets_a_batch_at_the_knee(strategy: str) -> None:
    """h(1000) is 4.02 ms, so that 24 records make 5 ms a twentieth."""
    it = measured(strategy=strategy)
    it.add(of_lengths(0, [1_000] * 23))
    assert it.due(0.0, backlog=False) is None
    it.add(of_lengths(23, [1_000]))
    assert it.due(0.0, backlog=False) == "knee"
    assert it.full() is None


def test_a_knee_that_the_limits_keep_out_of_reach_takes_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 records of 1,000 are 64 ms of the 95 that the knee asks for, however many wait."""
    it = measured(strategy="bucketed", max_padded=16_000)
    monkeypatch.setattr(it._window, "shape", lambda: pytest.fail("a batch was made out"))
    for number in range(60):
        it.add(of_lengths(number, [10 * number + 400]))
        assert it.due(0.0, backlog=False) is None


def test_a_guess_knows_of_no_knee() -> None:
    it = Batcher("text", BatchSettings(length="bytes"), lambda: 1, cost=OnlineCost(GUESS))
    it.add(of_lengths(0, [100_000] * 10))
    assert it.due(0.0, backlog=False) is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_target_closes_a_window_before_it_is_too_late(strategy: str) -> None:
    it = measured(strategy=strategy, max_wait_ms=1_000, target_latency_ms=100, target_margin_ms=10)
    it.add(of_lengths(0, [1_000], arrived_at=1.0))
    latest = 1.0 + 0.1 - 0.01 - MODEL.time_ms(1, 1_000) / 1_000
    assert it.deadline == pytest.approx(latest)
    assert it.due(latest - 0.001, backlog=False) is None
    assert it.due(latest + 1e-9, backlog=False) == "slo"
    it.add(of_lengths(1, [1_000] * 4, arrived_at=1.01))
    assert it.deadline == pytest.approx(1.09 - MODEL.time_ms(5, 1_000) / 1_000)


@pytest.mark.parametrize("strategy", ["bucketed", "exact"])
def test_the_other_batches_that_wait_are_allowed_for(strategy: str) -> None:
    """Ten of 400 and one of 10: padding the short one would cost less than a batch of its own only without α."""
    it = measured(strategy=strategy, max_wait_ms=1_000, max_size=10, target_latency_ms=100, target_margin_ms=0)
    it.add(of_lengths(0, [400] * 9, arrived_at=1.0))
    alone = 1.1 - MODEL.time_ms(9, 400) / 1_000
    assert it.deadline == pytest.approx(alone, abs=1.5e-3)  # as if there were one more already
    it.add(of_lengths(9, [10] * 2, arrived_at=1.01))
    assert it.deadline is not None
    both_s = (MODEL.time_ms(9, 400) + MODEL.time_ms(2, 10)) / 1_000
    assert it.deadline <= 1.1 - both_s + 1e-9


def test_without_lengths_a_target_is_kept_by_what_batches_were_seen_to_take() -> None:
    batch = {"max_wait_ms": 1_000, "target_latency_ms": 100, "target_margin_ms": 10}
    it = Batcher("text", BatchSettings.model_validate(batch), itertools.count(1).__next__, cost=OnlineCost())
    it.add(span(lease(), 0, 1, arrived_at=1.0))
    assert it.deadline == 1.0 + 0.09 / 2, "half of what there is, while nobody knows"
    for number in range(1, 60):
        taken = it.take(1.0, "slo")
        it.ran(taken, 30.0 + taken.size)
        it.add(span(lease(), number, 1 + number % 5, arrived_at=1.0))
    taken = it.take(1.0, "slo")
    assert taken.predicted_ms == pytest.approx(30 + taken.size, rel=0.1)
    assert taken.padding_ratio is None
    it.add(span(lease(), 100, 6, arrived_at=2.0))
    assert it.deadline == pytest.approx(2.0 + 0.09 - 0.036, abs=0.006)
    assert it.due(2.0 + 0.09 - 0.03, backlog=False) == "slo"


@given(
    arrivals=st.lists(st.tuples(st.floats(0, 0.02), st.integers(1, 800)), min_size=1, max_size=7),
    strategy=st.sampled_from(STRATEGIES),
)
@settings(max_examples=150, deadline=None)
def test_an_idle_worker_keeps_every_target_that_can_be_kept(arrivals: list[tuple[float, int]], strategy: str) -> None:
    """One worker, which is not asked before the deadline: whatever waits then, and comes later, is answered in time."""
    it = measured(strategy=strategy, max_wait_ms=10_000, target_latency_ms=200, target_margin_ms=0)
    coming = list(itertools.accumulate(arrivals, lambda one, other: (one[0] + other[0], other[1])))
    now, missed, first = 0.0, 0, 0
    while first < len(coming) or it.size:
        deadline = it.deadline
        if first < len(coming) and (deadline is None or coming[first][0] <= max(deadline, now)):
            now = max(now, coming[first][0])
            it.add(of_lengths(first, [coming[first][1]], arrived_at=coming[first][0]))
            first += 1
            continue
        assert deadline is not None
        now = max(now, deadline) + 1e-9
        batch = it.take(now, it.due(now, backlog=False) or "slo")
        assert batch.predicted_ms is not None
        now += batch.predicted_ms / 1_000
        missed += sum(now > part.arrived_at + 0.2 + 1e-6 for part in batch.spans)
    assert not missed


def test_a_wait_that_ends_before_the_target_ends_the_window() -> None:
    it = measured(max_wait_ms=10, target_latency_ms=5_000)
    it.add(of_lengths(0, [10], arrived_at=1.0))
    assert it.deadline == 1.01
    assert it.due(1.01, backlog=False) == "wait"


def test_an_overdue_record_goes_before_a_full_batch() -> None:
    for now, lengths in ((0.005, [100, 100]), (0.02, [9_000])):
        it = measured(strategy="bucketed", max_size=2, max_wait_ms=10)
        it.add(of_lengths(0, [9_000, 100, 100]))
        rule_name = it.full()
        assert rule_name == "size"
        assert [length for part in it.take(now, rule_name).spans for length in part.lengths or ()] == lengths


def test_there_is_nothing_to_take_from_an_empty_batcher() -> None:
    with pytest.raises(AssertionError, match="nothing to take"):
        batcher().take(0.0, "wait")


def test_times_that_batches_took_improve_the_predictions() -> None:
    it = measured(strategy="fifo")
    for first in range(300):
        it.add(of_lengths(first, [100]))
        taken = it.take(0.0, "wait")
        it.ran(taken, 50.0)
    assert taken.predicted_ms == pytest.approx(50.0, rel=0.05)


arrivals = st.lists(
    st.tuples(st.integers(0, 15), st.lists(st.integers(0, 400), min_size=1, max_size=6)), min_size=1, max_size=25
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(arrivals=arrivals, max_size=st.integers(1, 8), max_padded=st.one_of(st.none(), st.integers(1, 1_500)))
@settings(max_examples=80, deadline=None)
def test_while_workers_are_free_no_record_waits_longer_than_the_wait(
    strategy: str, arrivals: list[tuple[int, list[int]]], max_size: int, max_padded: int | None
) -> None:
    it = measured(strategy=strategy, max_size=max_size, max_padded=max_padded, max_wait_ms=10)
    now, first, gone = 0.0, 0, 0

    def dispatch() -> int:
        count = 0
        while (rule_name := it.due(now, backlog=False)) is not None:
            opened_at = it.opened_at
            taken = it.take(now, rule_name)
            assert all(now <= part.arrived_at + 0.01 for part in taken.spans), "a record that waited too long"
            if rule_name == "wait":
                assert taken.opened_at == opened_at, "the oldest record is in it"
            count += taken.size
        return count

    for ms, lengths in arrivals:
        comes_at = now + ms / 1_000
        while (deadline := it.deadline) is not None and deadline <= comes_at:
            now = deadline
            gone += dispatch()
        now = comes_at
        it.add(of_lengths(first, lengths, arrived_at=now))
        first += len(lengths)
        gone += dispatch()
    while (deadline := it.deadline) is not None:
        now = deadline
        gone += dispatch()
    assert gone == first


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(
    before=st.lists(st.integers(0, 400), max_size=10),
    behind=st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=8), min_size=15, max_size=15),
)
@settings(max_examples=80, deadline=None)
def test_an_overdue_record_is_passed_by_no_more_batches_than_there_are_records_before_it(
    strategy: str, before: list[int], behind: list[list[int]]
) -> None:
    """Whatever arrives behind it, and by whatever rule batches are taken."""
    it = measured(strategy=strategy, max_size=4, max_wait_ms=10)
    it.add(of_lengths(0, [*before, 200]))
    now, first, passed = 1.0, len(before) + 1, 0
    for lengths in behind:
        it.add(of_lengths(first, lengths, arrived_at=now))
        first += len(lengths)
        taken = it.take(now, it.full() or "backlog")
        if any(part.first <= len(before) < part.stop for part in taken.spans):
            break
        passed += 1
    assert passed <= len(before)


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


# -- out of memory


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_after_an_out_of_memory_batches_are_smaller(strategy: str) -> None:
    it = measured(strategy=strategy, max_size=10)
    it.add(of_lengths(0, [100] * 40))
    first = it.take(0.0, "size")
    assert first.size == 10
    assert it.out_of_memory(first) == 8
    assert 6 <= it.take(0.0, it.due(0.0, backlog=True) or "").size <= 8


def test_it_takes_neither_lengths_nor_an_estimate() -> None:
    it = batcher(max_size=10)
    it.add(span(lease(), 0, 40))
    first = it.take(0.0, "size")
    assert it.out_of_memory(first) == 8
    assert it.full() == "memory"
    again = it.take(0.0, "memory")
    assert again.size == 8
    for _ in range(3_000):
        it.ran(again, 1.0)
    assert it.full() == "size"
    assert it.take(0.0, "size").size == 10


def test_a_batch_that_would_be_too_large_by_now_says_nothing_new() -> None:
    it = batcher(max_size=10)
    it.add(span(lease(), 0, 20))
    first, behind = it.take(0.0, "size"), it.take(0.0, "size")
    assert it.out_of_memory(first) == 8
    assert it.out_of_memory(behind) is None


def test_parts_and_records_alone_say_nothing_new() -> None:
    it = batcher(max_size=10)
    it.add(span(lease(), 0, 11))
    part, alone = it.take(0.0, "size"), it.take(0.0, "wait")
    part.attempt = 2
    assert alone.size == 1
    assert (it.out_of_memory(part), it.out_of_memory(alone)) == (None, None)


def test_one_record_that_runs_out_of_memory_alone_does_not_make_batches_smaller() -> None:
    it = batcher(max_size=10)
    it.add(span(lease(), 0, 30))
    it.out_of_memory(it.take(0.0, "size"))
    culprit = it.take(0.0, "size")
    culprit.attempt = 4
    it.forgive(culprit)
    assert it.take(0.0, "wait").size == 10


@given(
    strategy=st.sampled_from(STRATEGIES),
    lengths=st.lists(st.integers(0, 3_000), min_size=1, max_size=80),
    room=st.integers(1, 60),
    longest=st.integers(1, 3_000),
)
def test_memory_that_no_estimate_knows_of_is_found_and_kept_to(
    strategy: str, lengths: list[int], room: int, longest: int
) -> None:
    """Whatever a worker has room for, soon no batch of more than one record exceeds it."""
    settings_ = BatchSettings.model_validate({"length": "bytes", "strategy": strategy})
    it = Batcher("text", settings_, lambda: 1, cost=OnlineCost())
    failed = 0
    for round_ in range(40):
        it.add(of_lengths(round_ * len(lengths), lengths))
        while it.size:
            taken = it.take(0.0, "backlog")
            assert taken.longest is not None
            if taken.size > 1 and taken.size * max(taken.longest, 1) > room * longest:
                failed += 1
                assert it.out_of_memory(taken) is not None
    assert failed <= 1 + math.log(80 * 3_000, 1.25)


# -- records that fit no batch


def test_records_that_fit_no_batch_are_told_with_what_is_wrong() -> None:
    it = measured(memory=1_000, max_padded=2_000, max_bytes=50, oversized="dead_letter")
    sizes, lengths = [10, 51, 10, -1, 10], [900, 10, 2_001, 1, 901]
    one = Span(LEASE, 0, span(LEASE, 0, 5).records, sizes, 0.0, lengths)
    refused = it.refused(one)
    assert [index for index, _ in refused] == [1, 2, 4]
    by_bytes, by_padding, by_memory = (failure.message for _, failure in refused)
    assert "its value has 51 bytes, and batch.max_bytes is 50" in by_bytes
    assert "its length is 2001, and batch.max_padded is 2000" in by_padding
    assert "predicted to need 1001 bytes of memory, its length being 901, and a worker may hold 1000" in by_memory
    assert {(failure.cause, failure.stage) for _, failure in refused} == {(Cause.TOO_LARGE, "batch")}
    assert all("set batch.oversized to alone" in failure.message for _, failure in refused)


def test_by_default_they_run_alone() -> None:
    it = measured(memory=1_000)
    one = of_lengths(0, [901, 10])
    assert it.refused(one) == []
    it.add(one)
    assert [it.take(1.0, "wait").size, it.take(1.0, "wait").size] == [1, 1]
