"""The strategies of a window: whatever comes and goes, nothing is lost, no limit is exceeded, nobody is passed over."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamproc.records import Lease, Span
from streamproc.runtime.cost import CostModel
from streamproc.runtime.grouping import cheapest_division, reach
from streamproc.runtime.limits import Limits
from streamproc.runtime.online_cost import OnlineCost
from streamproc.runtime.window import Window
from streamproc.runtime.window_bucketed import BOUNDS, RATIO, BucketedWindow
from streamproc.runtime.window_exact import ExactWindow
from streamproc.runtime.window_fifo import FifoWindow
from tests.support.spans import lease, span

STRATEGIES = ["fifo", "bucketed", "exact"]
MODEL = CostModel(5.0, 0.02, 0.002, 2e-6, a_bytes=100, c_bytes=2)


def window(strategy: str, limits: Limits, cost: OnlineCost, *, planned: int = 512) -> Window:
    if strategy == "fifo":
        return FifoWindow(limits, measured=True)
    return BucketedWindow(limits, cost) if strategy == "bucketed" else ExactWindow(limits, cost, window=planned)


def records(of: Lease, first: int, lengths: list[int], *, sizes: list[int] | None = None, at: float = 0.0) -> Span:
    values = [b"x" * size for size in sizes or [1] * len(lengths)]
    it = span(of, first, len(lengths), values=values, arrived_at=at)
    return Span(it.lease, it.first, it.records, it.sizes, it.arrived_at, lengths)


@dataclass(frozen=True)
class Waiting:
    """A record that the model knows to wait, in order of arrival."""

    number: int
    lease: Lease
    sequence: int
    size: int
    length: int
    arrived_at: float


class WindowAgainstModel(RuleBasedStateMachine):
    """Records that come, batches that go, leases that are given back, against a list of records."""

    @initialize(
        strategy=st.sampled_from(STRATEGIES),
        max_size=st.integers(1, 10),
        max_bytes=st.sampled_from([20, 60, 10_000]),
        max_padded=st.sampled_from([None, 50, 600]),
        budget=st.sampled_from([None, 90, 400, 3_000]),
        alpha=st.sampled_from([0.001, 1.0, 100.0]),
        planned=st.sampled_from([1, 12, 512]),
    )
    def begin(
        self,
        *,
        strategy: str,
        max_size: int,
        max_bytes: int,
        max_padded: int | None,
        budget: int | None,
        alpha: float,
        planned: int,
    ) -> None:
        self.cost = OnlineCost(CostModel(alpha, 0.02, 0.01, 0, a_bytes=100, c_bytes=2))
        self.limits = Limits(max_size, max_bytes, max_padded=max_padded, cost=self.cost, memory_budget_bytes=budget)
        self.max_bytes = max_bytes
        self.window = window(strategy, self.limits, self.cost, planned=planned)
        self.leases = [lease(partition) for partition in range(3)]
        self.read = dict.fromkeys(self.leases, 0)
        self.waiting: list[Waiting] = []
        self.numbers = itertools.count()
        self.reached = 0
        self.now = 0.0

    @rule(
        number=st.integers(0, 2),
        some=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 300)), min_size=1, max_size=12),
    )
    def add(self, number: int, some: list[tuple[int, int]]) -> None:
        it, self.now = self.leases[number], self.now + 1
        first = self.read[it]
        self.window.add(records(it, first, [one[1] for one in some], sizes=[one[0] for one in some], at=self.now))
        self.waiting += [
            Waiting(next(self.numbers), it, first + index, size, length, self.now)
            for index, (size, length) in enumerate(some)
        ]
        self.read[it] += len(some)

    @precondition(lambda self: self.waiting)
    @rule(oldest=st.booleans())
    def take(self, oldest: bool) -> None:
        size, length, _ = self.window.shape()
        given = self.given(self.window.take(oldest=oldest))
        if oldest:
            assert self.waiting[0] in given
            assert size >= 1
            assert max(it.length for it in given) <= length
        longest = max(it.length for it in given)
        if len(given) > 1:
            assert len(given) <= self.limits.n_max(longest)
            assert sum(it.size for it in given) <= self.max_bytes
        self.waiting = [it for it in self.waiting if it not in given]
        self.reached = max(self.reached, given[-1].number + 1)

    @precondition(lambda self: self.window.is_overtaken())
    @rule()
    def take_overtaken(self) -> None:
        """The oldest that others overtook, until none is left."""
        given = self.given(self.window.take_overtaken())
        assert given == self.waiting[: len(given)]
        assert given[-1].number < self.reached
        assert len(given) == 1 or (
            len(given) <= self.limits.n_max(max(it.length for it in given))
            and sum(it.size for it in given) <= self.max_bytes
        )
        self.waiting = self.waiting[len(given) :]

    @rule(factor=st.sampled_from([0.5, 1.5]))
    def learn(self, factor: float) -> None:
        """What a batch may hold, and what it costs, changes while records wait."""
        self.cost.kappa = max(1.0, self.cost.kappa * factor)
        self.cost.observe_time(3, 30, factor)

    @rule(numbers=st.one_of(st.none(), st.sets(st.integers(0, 2))))
    def discard(self, numbers: set[int] | None) -> None:
        gone = set(self.leases) if numbers is None else {self.leases[number] for number in numbers}
        given = self.given(self.window.discard(None if numbers is None else gone))
        assert given == [it for it in self.waiting if it.lease in gone]
        self.waiting = [it for it in self.waiting if it.lease not in gone]
        for number in numbers or ():
            self.leases[number] = lease(number, self.leases[number].epoch + 1)
            self.read[self.leases[number]] = 0

    def given(self, spans: list[Span]) -> list[Waiting]:
        """What was given out, which waited until now, in order; neighbours of one polled span come as one."""
        known = {(it.lease, it.sequence): it for it in self.waiting}
        found = []
        for part in spans:
            assert part.lengths is not None
            assert len(part.records) == len(part.sizes) == len(part.lengths) > 0
            for index, record in enumerate(part.records):
                it = known.pop((part.lease, part.first + index))
                assert (it.size, it.length, it.arrived_at) == (part.sizes[index], part.lengths[index], part.arrived_at)
                assert record.offset == 100 + it.sequence
                found.append(it)
        assert found == sorted(found, key=lambda it: it.number)
        for before, after in itertools.pairwise(spans):
            assert not (
                before.lease is after.lease and before.stop == after.first and before.arrived_at == after.arrived_at
            )
        return found

    @invariant()
    def the_books_are_right(self) -> None:
        assert self.window.size == len(self.waiting)
        assert self.window.size_bytes == sum(it.size for it in self.waiting)
        assert self.window.opened_at == (self.waiting[0].arrived_at if self.waiting else None)
        overtaken = bool(self.waiting) and self.waiting[0].number < self.reached
        assert self.window.is_overtaken() == overtaken
        assert not (self.waiting and self.window.ripe() is None and len(self.waiting) >= self.limits.max_size)
        if not self.waiting:
            assert (self.window.full(), self.window.ripe()) == (None, None)


TestWindowAgainstModel = WindowAgainstModel.TestCase
TestWindowAgainstModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(lengths=st.lists(st.integers(0, 400), min_size=1, max_size=60), alpha=st.floats(0.01, 50))
@settings(max_examples=60, deadline=None)
def test_a_window_is_emptied_by_as_many_batches_as_it_has_records_at_most(
    strategy: str, lengths: list[int], alpha: float
) -> None:
    cost = OnlineCost(CostModel(alpha, 0.02, 0.01))
    it = window(strategy, Limits(7, 1_000, max_padded=500), cost)
    it.add(records(lease(), 0, lengths))
    taken = 0
    while it.size:
        before = it.size
        given = it.take(oldest=True)
        taken += sum(len(part.records) for part in given)
        assert it.size < before
    assert taken == len(lengths)


@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=40),
    alpha=st.floats(0.01, 50),
    max_size=st.integers(1, 12),
    max_padded=st.one_of(st.none(), st.integers(1, 2_000)),
)
@settings(max_examples=150, deadline=None)
def test_the_exact_windows_batch_is_one_of_the_cheapest_division(
    lengths: list[int], alpha: float, max_size: int, max_padded: int | None
) -> None:
    model, limits = CostModel(alpha, 0.02, 0.01), Limits(max_size, 1_000, max_padded=max_padded)
    it = ExactWindow(limits, OnlineCost(model))
    it.add(records(lease(), 0, lengths))
    shape = it.shape()
    taken = [length for part in it.take(oldest=True) for length in part.lengths or ()]
    assert shape[:2] == (len(taken), max(taken))
    whole_ms = model.time_ms(*shape[:2]) + shape.rest_ms

    def least(some: list[int]) -> float:
        totals = range(len(some) + 1)
        costs = [model.record_ms(length) for length in some]
        return cheapest_division(costs, totals, alpha, reach(some, totals, limits))[1]

    rest = sorted(lengths)
    for length in taken:
        rest.remove(length)
    assert model.time_ms(len(taken), max(taken)) + least(rest) == pytest.approx(least(sorted(lengths)), rel=1e-9)
    assert whole_ms == pytest.approx(least(sorted(lengths)), rel=1e-9)


def taken_lengths(it: Window, *, oldest: bool = True) -> list[int]:
    return [length for part in it.take(oldest=oldest) for length in part.lengths or ()]


def bucketed(alpha: float, max_padded: int | None = None) -> BucketedWindow:
    return BucketedWindow(Limits(4, 1_000, max_padded=max_padded), OnlineCost(CostModel(alpha, gamma_ms=0.01)))


def test_buckets_reach_an_eighth_further_each() -> None:
    assert all(after <= (before + 1) * RATIO for before, after in itertools.pairwise(BOUNDS))


def test_a_bucket_that_fills_a_batch_goes_alone() -> None:
    it = bucketed(alpha=100.0)
    it.add(records(lease(), 0, [100, 20, 100, 20, 100, 100]))
    assert it.full() == "size"
    assert taken_lengths(it) == [100] * 4


def test_a_full_bucket_goes_before_the_oldest_record_unless_that_is_asked_for() -> None:
    for oldest, lengths in ((False, [100] * 4), (True, [900])):
        it = bucketed(alpha=0.1)
        it.add(records(lease(), 0, [900, 100, 100, 100, 100]))
        assert taken_lengths(it, oldest=oldest) == lengths


def test_neighbours_come_in_while_the_padding_costs_less_than_the_batch_saved() -> None:
    """Padding a record of 20 to 100 costs 0.8 ms, two of them 1.6."""
    for alpha, lengths in ((0.7, [100]), (0.9, [100, 20]), (3.0, [100, 20])):
        it = bucketed(alpha=alpha)
        it.add(records(lease(), 0, [100, 20]))
        assert taken_lengths(it) == lengths
    it = bucketed(alpha=1.5)
    it.add(records(lease(), 0, [100, 20, 20]))
    assert taken_lengths(it) == [100]


def test_longer_neighbours_come_in_too() -> None:
    it = bucketed(alpha=1.0)
    it.add(records(lease(), 0, [20, 100]))
    assert taken_lengths(it) == [20, 100]


def test_what_would_not_fit_does_not_come_in() -> None:
    it = bucketed(alpha=100.0, max_padded=150)
    it.add(records(lease(), 0, [100, 20]))
    assert taken_lengths(it) == [100]


def test_in_order_of_arrival_the_padded_length_ends_a_batch() -> None:
    it = FifoWindow(Limits(10, 1_000, max_padded=100), measured=True)
    it.add(records(lease(), 0, [10, 20, 30]))
    assert it.full() is None
    it.add(records(lease(), 3, [30]))
    assert it.full() == "padding"
    assert it.shape()[:2] == (3, 30)
    assert taken_lengths(it) == [10, 20, 30]


def test_the_exact_window_plans_for_the_oldest_and_the_others_move_up() -> None:
    it = ExactWindow(Limits(2, 1_000), OnlineCost(CostModel(1.0, gamma_ms=0.01)), window=4)
    it.add(records(lease(), 0, [50, 400, 50, 400, 1, 50]))
    assert it.full() == "size"
    assert taken_lengths(it) == [50, 50]
    assert taken_lengths(it) == [400, 400]
    assert taken_lengths(it) == [1, 50]


def test_a_window_that_goes_by_length_refuses_records_without() -> None:
    for strategy in STRATEGIES:
        with pytest.raises(AssertionError, match="without lengths"):
            window(strategy, Limits(2, 1_000), OnlineCost()).add(span(lease(), 0, 1))
