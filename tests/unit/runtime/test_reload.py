"""What a reload may change, and what the stages make of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.records import Cause as FailureCause
from streamproc.records import Failure, Outcome, Status
from streamproc.runtime.batcher import OVERTAKEN, Batcher
from streamproc.runtime.circuit import Circuit
from streamproc.runtime.online_cost import OnlineCost
from streamproc.runtime.reload import _MAY_CHANGE, fixed_changes
from streamproc.settings import BatchSettings, CircuitSettings, Section, Settings
from tests.support.spans import lease, outcome, span

BASE: dict[str, Any] = {
    "name": "app",
    "backend": {"path": "inference:Backend", "version": "1"},
    "tasks": {"text": {"input": {"topics": ["in"]}}, "image": {"input": {"topics": ["pictures"]}}},
}


def changed(**sections: Any) -> Settings:
    """The base with other values, by dotted names whose dots are two underscores."""
    told: dict[str, Any] = Settings.model_validate(BASE).model_dump()
    for name, value in sections.items():
        *path, last = name.split("__")
        at = told
        for part in path:
            at = at[part]
        at[last] = value
    return Settings.model_validate(told)


@pytest.mark.parametrize(
    "sections",
    [
        {"backend__path": "other:Backend", "backend__version": "2", "backend__config": {"width": 3}},
        {"backend__loader": "module"},
        {"pool__workers": 4, "pool__batch_timeout_s": 3},
        {"logging__level": "debug"},
        {"topics_dir": "elsewhere"},
        {"tasks__text__batch__max_size": 3, "tasks__text__batch__max_wait_ms": 1},
        {"tasks__text__on_error__retries": 7, "tasks__text__limits__max_in_flight_records": 100},
        {"tasks__image__commit_interval_ms": 50, "tasks__image__input__max_value_bytes": 5},
    ],
    ids=", ".join,
)
def test_model_limits_and_policies_may_change(sections: dict[str, Any]) -> None:
    assert list(fixed_changes(Settings.model_validate(BASE), changed(**sections))) == []


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"name": "other"}, "name"),
        ({"kafka__bootstrap_servers": "other:9092"}, "kafka.bootstrap_servers"),
        ({"http__port": 1}, "http.port"),
        ({"tasks__text__input__topics": ["in", "more"]}, "tasks.text.input.topics"),
        ({"tasks__text__output__envelope": "result"}, "tasks.text.output.envelope"),
        ({"tasks__image__delivery": "exactly_once"}, "tasks.image.delivery"),
        ({"tasks__image__ordering": "key"}, "tasks.image.ordering"),
        ({"tasks__text__batch__length": "bytes"}, "tasks.text.batch.length"),
        ({"tasks__text__batch__strategy": "none"}, "tasks.text.batch.strategy"),
        ({"tasks": {"text": BASE["tasks"]["text"]}}, "tasks.image"),
        ({"tasks": {**BASE["tasks"], "sound": {"input": {"topics": ["noise"]}}}}, "tasks.sound"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_consumers_producers_and_windows_were_made_for_may_not(sections: dict[str, Any], named: str) -> None:
    assert list(fixed_changes(Settings.model_validate(BASE), changed(**sections, backend__version="2"))) == [named]


def test_what_may_change_are_settings_that_there_are() -> None:
    for pattern in _MAY_CHANGE:
        at: Any = Settings.model_validate(BASE)
        for part in pattern.split("."):
            if part == "*":
                at = at["text"]
            else:
                assert isinstance(at, Section)
                assert part in type(at).model_fields, pattern
                at = getattr(at, part)


def batcher(strategy: str, max_size: int) -> Batcher:
    length = {} if strategy == "fifo" else {"length": "bytes"}
    settings = BatchSettings.model_validate({"strategy": strategy, "max_size": max_size, **length})
    return Batcher("text", settings, itertools.count(1).__next__, cost=OnlineCost() if length else None)


@given(
    strategy=st.sampled_from(["fifo", "bucketed", "exact"]),
    spans=st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=12), max_size=8),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    taken=st.integers(0, 5),
)
def test_a_batchers_successor_has_what_waited_and_knows_that_some_was_overtaken(
    strategy: str, spans: list[list[int]], sizes: tuple[int, int], taken: int
) -> None:
    before, after = (batcher(strategy, size) for size in sizes)
    of, first = lease(), 0
    for lengths in spans:
        it = span(of, first, len(lengths), values=[b"x" * length for length in lengths])
        it.lengths = lengths
        before.add(it)
        first += len(lengths)
    out: list[int] = []

    def keep(take: Callable[[], Any]) -> None:
        out.extend(sequence for part in take().spans for sequence in range(part.first, part.stop))

    for _ in range(taken):
        if before.size:
            keep(lambda: before.take(0.0, "wait"))
    overtaken = before.overtaken()
    left, opened_at = before.size, before.opened_at
    after.take_over(before)
    assert (before.size, after.size, after.opened_at) == (0, left, opened_at)
    if overtaken:
        assert after.overtaken(), "results that pile up wait for these, and nothing else would be dispatched"
    while after.overtaken():
        keep(lambda: after.take(0.0, OVERTAKEN))
    while after.size:
        keep(lambda: after.take(0.0, "wait"))
    assert sorted(out) == list(range(first))


BAD = Failure(FailureCause.EXCEPTION, "execute", "ValueError", "no")


def failed(circuit: Circuit, count: int) -> bool:
    it = outcome(span(lease(), 0, count))
    return circuit.take(Outcome(it.span, bytes([Status.FAILED]) * count, [BAD] * count, it.report), 1.0)


def test_a_circuit_forgets_what_it_counted_of_the_version_before_and_has_the_new_limits() -> None:
    circuit = Circuit(CircuitSettings(max_rate=None, max_run=10))
    assert not failed(circuit, 9)
    circuit.reload(CircuitSettings(max_rate=None, max_run=5))
    assert circuit.counts(1.0) == (0, 0)
    assert not failed(circuit, 4)
    assert failed(circuit, 1)
    assert not circuit.by_hand
    circuit.open_by_hand(2.0)
    assert circuit.by_hand
    circuit.close()
    assert not circuit.by_hand
