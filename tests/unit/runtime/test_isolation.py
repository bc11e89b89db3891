"""What becomes of a failed batch: retried, split, given up; and how many executions and workers a culprit costs."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.records import Batch, Cause, Failure
from streamproc.runtime.isolation import MAX_BACKOFF_S, GiveUp, Isolation, Retry, Split
from streamproc.settings import ErrorSettings
from tests.support.spans import batch, lease, span

RAISED = Failure(Cause.EXCEPTION, "execute", "ValueError", "no")
FAILURES = {
    "exception": RAISED,
    "output": Failure(Cause.OUTPUT, "output", "WrongOutputCount", "no"),
    "crash": Failure(Cause.CRASH, "worker", "WorkerDied", "no"),
    "timeout": Failure(Cause.TIMEOUT, "worker", "DeadlineExceeded", "no"),
    "memory error": Failure(Cause.OOM, "execute", "MemoryError", "no"),
    "out of memory": Failure(Cause.OOM, "worker", "OutOfMemory", "no"),
}
ENDS_ITS_WORKER = {"crash", "out of memory", "timeout"}


def isolation(**options: Any) -> Isolation:
    return Isolation(ErrorSettings.model_validate(options), itertools.count(100).__next__, random.Random(7))


def members(of: Batch) -> list[int]:
    return [record.offset - 100 for part in of.spans for record in part.records]


def test_a_batch_that_raised_is_retried_as_a_whole_first() -> None:
    policy = isolation(retries=2, backoff_ms=100)
    failed = batch([span(lease(), 0, 8)])
    first = policy.decide(failed, RAISED)
    assert isinstance(first, Retry)
    assert 0.05 <= first.delay_s <= 0.1
    assert (first.batch.size, first.batch.attempt, first.batch.id) == (8, 2, 100)
    second = policy.decide(first.batch, RAISED)
    assert isinstance(second, Retry)
    assert 0.1 <= second.delay_s <= 0.2
    assert isinstance(policy.decide(second.batch, RAISED), Split)


@pytest.mark.parametrize("name", [name for name in FAILURES if name != "exception"])
def test_for_every_other_cause_a_batch_is_split_at_once(name: str) -> None:
    assert isinstance(isolation(retries=5).decide(batch([span(lease(), 0, 8)]), FAILURES[name]), Split)


def test_each_cause_has_a_policy_of_its_own() -> None:
    policy = isolation(retries=2, causes={"crash": {"retries": 1, "backoff_ms": 1_000}, "exception": {"retries": 0}})
    failed = batch([span(lease(), 0, 8)])
    assert isinstance(policy.decide(failed, RAISED), Split)
    again = policy.decide(failed, FAILURES["crash"])
    assert isinstance(again, Retry)
    assert 0.5 <= again.delay_s <= 1
    assert isinstance(policy.decide(again.batch, FAILURES["crash"]), Split)


def test_retries_are_counted_for_each_cause_and_kept_when_a_batch_is_split() -> None:
    policy = isolation(retries=1)
    parts = policy.decide(batch([span(lease(), 0, 8)]), FAILURES["crash"])
    assert isinstance(parts, Split)
    again = policy.decide(parts.parts[0], RAISED)
    assert isinstance(again, Retry), "it had a crash before, and no retry for an exception yet"
    halves = policy.decide(again.batch, RAISED)
    assert isinstance(halves, Split)
    assert isinstance(policy.decide(halves.parts[0], RAISED), GiveUp), "its retry was before the split"


def test_a_record_alone_is_given_up_after_its_retries() -> None:
    policy = isolation(retries=1)
    again = policy.decide(batch([span(lease(), 0, 1)]), RAISED)
    assert isinstance(again, Retry)
    assert isinstance(policy.decide(again.batch, RAISED), GiveUp)


@pytest.mark.parametrize("name", ["crash", "out of memory", "timeout", "memory error"])
def test_a_record_that_fails_alone_for_the_first_time_without_having_failed_before_is_executed_once_more(
    name: str,
) -> None:
    policy = isolation()
    again = policy.decide(batch([span(lease(), 0, 1)]), FAILURES[name])
    assert isinstance(again, Retry)
    assert isinstance(policy.decide(again.batch, FAILURES[name]), GiveUp)


@pytest.mark.parametrize(
    ("name", "decision"), [("crash", Retry), ("out of memory", Retry), ("timeout", GiveUp), ("memory error", GiveUp)]
)
def test_after_a_split_only_a_death_is_not_believed_the_first_time(name: str, decision: type) -> None:
    policy = isolation()
    parts = policy.decide(batch([span(lease(), 0, 2)]), FAILURES[name])
    assert isinstance(parts, Split)
    assert isinstance(policy.decide(parts.parts[0], FAILURES[name]), decision)


def test_the_back_off_is_bounded() -> None:
    policy = isolation(retries=100, backoff_ms=10_000)
    late = batch([span(lease(), 0, 1)])
    late.retried = (Cause.EXCEPTION,) * 99
    again = policy.decide(late, RAISED)
    assert isinstance(again, Retry)
    assert again.delay_s <= MAX_BACKOFF_S


def test_halves_keep_the_order_and_split_spans_where_needed() -> None:
    decision = isolation(retries=0).decide(batch([span(lease(0), 0, 3), span(lease(1), 0, 2)]), RAISED)
    assert isinstance(decision, Split)
    left, right = decision.parts
    assert [(it.first, len(it.records)) for it in left.spans] == [(0, 2)]
    assert [(it.first, len(it.records)) for it in right.spans] == [(2, 1), (0, 2)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_four_records_or_fewer_are_split_one_by_one(size: int) -> None:
    decision = isolation(retries=0).decide(batch([span(lease(0), 5, size - 1), span(lease(1), 0, 1)]), RAISED)
    assert isinstance(decision, Split)
    assert [[(it.first, it.size_bytes) for it in part.spans] for part in decision.parts] == [
        *([(5 + index, 2)] for index in range(size - 1)),
        [(0, 2)],
    ]


class Model:
    """Executes batches as a worker would: what their records are decides how they fail, and who kills it from outside.

    Knows nothing of the policy but its decisions, and keeps what every record went through.
    """

    def __init__(self, policy: Isolation, culprits: dict[int, str], killed: Callable[[], bool]) -> None:
        self.policy = policy
        self.culprits = culprits
        self.killed = killed
        self.executions: Counter[int] = Counter()
        self.delivered: Counter[int] = Counter()
        self.given_up: dict[int, Cause] = {}
        self.retries: Counter[tuple[int, Cause]] = Counter()
        self.killed_alone: Counter[int] = Counter()
        self.deaths = 0

    def run(self, first: Batch, choose: random.Random) -> None:
        waiting = [first]
        while waiting:
            it = waiting.pop(choose.randrange(len(waiting)))
            inside = members(it)
            self.executions.update(inside)
            failure = self._execute(inside, choose)
            if failure is None:
                self.delivered.update(inside)
                continue
            decision = self.policy.decide(it, failure)
            if isinstance(decision, Retry):
                assert members(decision.batch) == inside
                self.retries.update((member, failure.cause) for member in inside)
                waiting.append(decision.batch)
            elif isinstance(decision, Split):
                assert [member for part in decision.parts for member in members(part)] == inside
                waiting.extend(decision.parts)
            else:
                (member,) = inside
                assert member not in self.given_up
                self.given_up[member] = failure.cause

    def _execute(self, inside: list[int], choose: random.Random) -> Failure | None:
        if self.killed():
            self.deaths += 1
            if len(inside) == 1:
                self.killed_alone.update(inside)
            return FAILURES["crash"]
        present = [member for member in inside if member in self.culprits]
        if not present:
            return None
        kind = self.culprits[choose.choice(present)]
        self.deaths += kind in ENDS_ITS_WORKER
        return FAILURES[kind]


def spread(size: int, spans: int) -> Batch:
    """A batch of that many records in that many spans."""
    one, parts, first = lease(), [], 0
    for count in [size // spans + (1 if index < size % spans else 0) for index in range(spans)]:
        if count:
            parts.append(span(one, first, count))
            first += count
    return batch(parts)


SIZES = st.integers(1, 130)
SEEDS = st.randoms(use_true_random=False)


@st.composite
def culprits_among(draw: st.DrawFn) -> tuple[int, dict[int, str]]:
    size = draw(SIZES)
    return size, draw(st.dictionaries(st.integers(0, size - 1), st.sampled_from(sorted(FAILURES)), max_size=6))


@given(culprits_among(), st.integers(1, 5), SEEDS)
@settings(max_examples=300, deadline=None)
def test_exactly_the_culprits_are_given_up_with_their_own_causes_within_the_promised_executions(
    given_culprits: tuple[int, dict[int, str]], spans: int, choose: random.Random
) -> None:
    size, culprits = given_culprits
    model = Model(isolation(retries=0), culprits, killed=lambda: False)
    model.run(spread(size, spans), choose)
    assert model.given_up == {member: FAILURES[kind].cause for member, kind in culprits.items()}
    assert model.delivered == Counter(set(range(size)) - set(culprits))
    further = math.ceil(math.log2(size)) + 1
    assert max(model.executions.values()) <= 1 + further


@given(st.integers(0, 63), st.sampled_from(sorted(ENDS_ITS_WORKER)), SEEDS)
@settings(max_examples=200, deadline=None)
def test_a_culprit_among_64_ends_at_most_seven_workers(member: int, kind: str, choose: random.Random) -> None:
    model = Model(isolation(), {member: kind}, killed=lambda: False)
    model.run(spread(64, 3), choose)
    assert set(model.given_up) == {member}
    assert model.deaths == (6 if kind == "timeout" else 7)


@given(culprits_among(), st.integers(0, 3), st.integers(0, 3), st.lists(st.booleans(), max_size=60), SEEDS)
@settings(max_examples=500, deadline=None)
def test_workers_killed_from_outside_cost_no_innocent_record_unless_twice_alone(
    given_culprits: tuple[int, dict[int, str]],
    retries: int,
    crash_retries: int,
    kills: list[bool],
    choose: random.Random,
) -> None:
    size, culprits = given_culprits
    kill = iter(kills)
    policy = isolation(retries=retries, backoff_ms=1, causes={"crash": {"retries": crash_retries}})
    model = Model(policy, culprits, killed=lambda: next(kill, False))
    model.run(spread(size, 2), choose)
    assert set(model.given_up) | set(model.delivered) == set(range(size)), "nobody is lost"
    assert not set(model.given_up) & set(model.delivered)
    assert set(model.delivered.values()) <= {1}
    assert not set(model.delivered) & set(culprits)
    for member, cause in model.given_up.items():
        if member in culprits:
            assert cause == FAILURES[culprits[member]].cause or model.killed_alone[member] >= 2
        else:
            assert (cause, model.killed_alone[member] >= 2) == (Cause.CRASH, True)
    allowed = {Cause.EXCEPTION: retries, Cause.CRASH: crash_retries, Cause.TIMEOUT: 0, Cause.OOM: 0, Cause.OUTPUT: 0}
    for (_, cause), count in model.retries.items():
        assert count <= allowed[cause] + (cause in (Cause.CRASH, Cause.TIMEOUT, Cause.OOM))


@given(SEEDS)
@settings(max_examples=50, deadline=None)
def test_the_pauses_before_retries_double_with_jitter(rng: random.Random) -> None:
    policy = Isolation(ErrorSettings(retries=8, backoff_ms=100), itertools.count().__next__, rng)
    it = batch([span(lease(), 0, 8)])
    for retry in range(8):
        decision = policy.decide(it, RAISED)
        assert isinstance(decision, Retry)
        assert 0.05 * 2**retry <= decision.delay_s <= 0.1 * 2**retry
        it = decision.batch
