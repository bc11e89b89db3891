"""Which of several tasks gets the worker."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.records import Batch, Span
from streamproc.runtime.batcher import Batcher
from streamproc.runtime.cost import CostModel
from streamproc.runtime.fairness import Candidate, Fairness, candidates
from streamproc.runtime.online_cost import OnlineCost
from streamproc.settings import BatchSettings
from tests.support.spans import lease, span


@dataclass
class Task:
    name: str
    batcher: Batcher
    backlog: bool = False
    crowded: bool = False


def task(name: str, waiting: int, *, arrived_at: float = 0.0, backlog: bool = False) -> Task:
    batcher = Batcher(name, BatchSettings(max_size=4, max_wait_ms=10), itertools.count(1).__next__)
    if waiting:
        batcher.add(span(lease(), 0, waiting, arrived_at=arrived_at))
    return Task(name, batcher, backlog)


def rules(tasks: list[Task], now: float, *, idle: bool) -> dict[str, str]:
    return {it.task: it.rule for it in candidates(tasks, now, idle=idle)}


def test_a_free_worker_may_have_every_window_that_is_due() -> None:
    tasks = [task("full", 4), task("late", 1, arrived_at=0.0), task("early", 1, arrived_at=0.015), task("none", 0)]
    assert rules(tasks, 0.02, idle=True) == {"full": "size", "late": "wait"}
    assert rules([task("behind", 1, backlog=True)], 0.0, idle=True) == {"behind": "backlog"}


def test_behind_a_running_batch_only_full_windows_queue() -> None:
    tasks = [task("late", 1), task("behind", 1, backlog=True)]
    assert rules(tasks, 0.02, idle=False) == {}


def test_a_place_that_a_full_window_would_take_is_for_those_that_are_late_too() -> None:
    tasks = [task("full", 4), task("late", 1), task("early", 1, arrived_at=0.015, backlog=True)]
    assert rules(tasks, 0.02, idle=False) == {"full": "size", "late": "wait"}


def test_while_results_pile_up_only_what_was_overtaken_goes_and_that_at_once() -> None:
    batcher = Batcher("a", BatchSettings(length="bytes", max_size=2), lambda: 1, cost=OnlineCost(CostModel(0.1, 0, 1)))
    it = Task("a", batcher, crowded=True)
    lengths = [900, 5, 5, 700]
    batcher.add(Span(lease(), 0, span(lease(), 0, 4).records, [1] * 4, 0.0, lengths))
    assert rules([it], 1.0, idle=True) == {}
    batcher.take(0.0, "size")
    assert rules([it], 1.0, idle=False) == {"a": "overtaken"}
    assert [part.lengths for part in batcher.take(1.0, "overtaken").spans] == [[900]]
    assert rules([it], 1.0, idle=True) == {}


NUMBERS = itertools.count()


def running(name: str, predicted_ms: float | None) -> Batch:
    return Batch(next(NUMBERS), name, [], 0.0, 0.0, "wait", 1.0, predicted_ms=predicted_ms)


def spend(it: Fairness, name: str, took_ms: float) -> None:
    batch = running(name, took_ms)
    it.dispatched(batch)
    it.ended(batch, took_ms)


def candidate(name: str, deadline: float = 1.0) -> Candidate:
    return Candidate(name, "wait", deadline - 0.01, deadline)


def test_the_earliest_deadline_goes_first_while_shares_are_even() -> None:
    it = Fairness({"a": 1, "b": 1})
    assert it.choose([candidate("a", 2.0), candidate("b", 1.0)]).task == "b"


def test_who_has_had_more_than_its_share_waits() -> None:
    it = Fairness({"a": 1, "b": 1})
    it.choose([candidate("a"), candidate("b", 2.0)])
    it.dispatched(running("a", 10.0))
    assert it.choose([candidate("a"), candidate("b", 2.0)]).task == "b"


def test_a_prediction_that_was_wrong_is_put_right() -> None:
    it = Fairness({"a": 1, "b": 1})
    both = [candidate("a"), candidate("b", 2.0)]
    it.choose(both)
    batches = running("a", 10.0), running("b", 1.0)
    for batch in batches:
        it.dispatched(batch)
    assert it.choose(both).task == "b"
    it.ended(batches[0], 10.0)
    it.ended(batches[1], 30.0)
    assert it.choose(both).task == "a"


def test_without_a_prediction_a_batch_is_charged_what_the_last_one_took() -> None:
    it = Fairness({"a": 1, "b": 1})
    both = [candidate("a"), candidate("b", 2.0)]
    it.choose(both)
    for name, took in (("a", 40.0), ("b", 50.0)):
        spend(it, name, took)
    it.dispatched(running("a", None))
    assert it.choose(both).task == "b"


def test_a_batch_that_was_not_executed_costs_nothing() -> None:
    it = Fairness({"a": 1, "b": 1})
    both = [candidate("a"), candidate("b", 2.0)]
    it.choose(both)
    batch = running("a", 10.0)
    it.dispatched(batch)
    it.ended(batch, 0.0)
    assert it.choose(both).task == "a"
    it.dispatched(batch)
    it.ended(batch, None)
    assert it.choose(both).task == "b", "one that was, for as long as was predicted"


def test_a_task_that_was_away_has_no_claim_on_what_it_did_not_use() -> None:
    it = Fairness({"busy": 1, "back": 1})
    for _ in range(100):
        assert it.choose([candidate("busy")]).task == "busy"
        spend(it, "busy", 10.0)
    got = []
    for _ in range(20):
        chosen = it.choose([candidate("busy", 1.0), candidate("back", 2.0)]).task
        spend(it, chosen, 10.0)
        got.append(chosen)
    assert 9 <= got.count("busy") <= 11


def test_a_weight_has_to_be_above_zero() -> None:
    with pytest.raises(ValueError, match="weight of task a is 0"):
        Fairness({"a": 0})


@given(
    weights=st.lists(st.sampled_from([1, 2, 3, 5]), min_size=2, max_size=4),
    costs=st.data(),
    deadlines=st.lists(st.floats(0, 10), min_size=4, max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_tasks_that_always_want_a_worker_get_their_shares(
    weights: list[int], costs: st.DataObject, deadlines: list[float]
) -> None:
    """Whatever their deadlines and batches: none is further from its share than two of the largest batches."""
    names = [str(index) for index in range(len(weights))]
    it = Fairness(dict(zip(names, weights, strict=True)))
    each = [costs.draw(st.floats(1, 50)) for _ in names]
    got = dict.fromkeys(names, 0.0)
    for _ in range(300):
        chosen = it.choose([candidate(name, deadlines[index]) for index, name in enumerate(names)]).task
        took = each[int(chosen)]
        spend(it, chosen, took)
        got[chosen] += took
    total = sum(got.values())
    for name, weight in zip(names, weights, strict=True):
        assert abs(got[name] - total * weight / sum(weights)) <= 2 * max(each) * sum(weights)
