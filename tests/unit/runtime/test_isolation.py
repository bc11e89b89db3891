"""What becomes of a failed batch: retried, split, given up; and how many executions a culprit costs."""

from __future__ import annotations

import itertools
import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.records import Batch, Failure
from streamproc.runtime.isolation import MAX_BACKOFF_S, GiveUp, Isolation, Retry, Split
from streamproc.settings import ErrorSettings
from tests.support.spans import batch, lease, span

FAILURE = Failure("execute", "ValueError", "no")
FINAL = Failure("output", "WrongOutputCount", "no", retriable=False)


def isolation(**options: int) -> Isolation:
    return Isolation(ErrorSettings.model_validate(options), itertools.count(100).__next__, random.Random(7))


def test_a_failed_batch_is_retried_as_a_whole_first() -> None:
    policy = isolation(retries=2, backoff_ms=100)
    failed = batch([span(lease(), 0, 8)])
    first = policy.decide(failed, FAILURE)
    assert isinstance(first, Retry)
    assert 0.05 <= first.delay_s <= 0.1
    assert (first.batch.size, first.batch.attempt, first.batch.id) == (8, 2, 100)
    second = policy.decide(first.batch, FAILURE)
    assert isinstance(second, Retry)
    assert 0.1 <= second.delay_s <= 0.2
    assert isinstance(policy.decide(second.batch, FAILURE), Split)


def test_a_failure_that_would_come_again_is_not_retried() -> None:
    assert isinstance(isolation(retries=5).decide(batch([span(lease(), 0, 8)]), FINAL), Split)


def test_a_record_alone_is_given_up_after_its_retries() -> None:
    policy = isolation(retries=1)
    again = policy.decide(batch([span(lease(), 0, 1)]), FAILURE)
    assert isinstance(again, Retry)
    assert isinstance(policy.decide(again.batch, FAILURE), GiveUp)


def test_the_back_off_is_bounded() -> None:
    policy = isolation(retries=100, backoff_ms=10_000)
    late = policy.decide(batch([span(lease(), 0, 1)], attempt=50), FAILURE)
    assert isinstance(late, Retry)
    assert late.delay_s <= MAX_BACKOFF_S


def test_halves_keep_the_order_and_split_spans_where_needed() -> None:
    decision = isolation(retries=0).decide(batch([span(lease(0), 0, 3), span(lease(1), 0, 2)]), FAILURE)
    assert isinstance(decision, Split)
    left, right = decision.halves
    assert [(it.first, len(it.records)) for it in left.spans] == [(0, 2)]
    assert [(it.first, len(it.records)) for it in right.spans] == [(2, 1), (0, 2)]


@given(size=st.integers(1, 64), data=st.data(), parts=st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_exactly_the_culprits_are_given_up_within_the_promised_executions(
    size: int, data: st.DataObject, parts: int
) -> None:
    culprits = data.draw(st.sets(st.integers(0, size - 1), max_size=5))
    policy = isolation(retries=0)
    one, spans, first = lease(), [], 0
    for count in [size // parts + (1 if index < size % parts else 0) for index in range(parts)]:
        if count:
            spans.append(span(one, first, count))
            first += count
    waiting: list[Batch] = [batch(spans)]
    executions = dict.fromkeys(range(size), 0)
    delivered: set[int] = set()
    given_up: set[int] = set()
    while waiting:
        it = waiting.pop()
        members = [record.offset - 100 for part in it.spans for record in part.records]
        for member in members:
            executions[member] += 1
        if not culprits & set(members):
            delivered |= set(members)
            continue
        decision = policy.decide(it, FAILURE)
        if isinstance(decision, Split):
            waiting.extend(decision.halves)
        else:
            assert isinstance(decision, GiveUp)
            given_up |= set(members)
    assert given_up == culprits
    assert delivered == set(range(size)) - culprits
    assert max(executions.values()) <= 1 + math.ceil(math.log2(size))
