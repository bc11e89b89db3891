"""The benchmarks' bookkeeping: turns, ratios, and verification that notices."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import orjson
import pytest

from benchmarks import large_values, worker
from benchmarks.feeding import TASK, spans_of
from benchmarks.preprocessors import differs
from benchmarks.turns import Spread, ratio, spread, take_turns
from streamproc.runtime.pool import Reply


class Clock:
    """Moves as the contestants say."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def takes(self, name: str, seconds: float) -> Callable[[], None]:
        def contestant() -> None:
            self.now += seconds
            self.log.append(name)

        return contestant

    def __call__(self) -> float:
        return self.now


def test_turns_are_timed_by_the_call_and_begin_with_another_one_each_round() -> None:
    clock = Clock()
    slow, fast = clock.takes("slow", 0.5), clock.takes("fast", 0.125)
    taken = take_turns({"slow": slow, "fast": fast}, rounds=2, turn_s=1.0, clock=clock)
    assert taken == {"slow": [0.5, 0.5], "fast": [0.125, 0.125]}
    turns = ["slow"] * 2 + ["fast"] * 8 + ["fast"] * 8 + ["slow"] * 2
    assert clock.log[-len(turns) :] == turns


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio([10.0, 40.0, 30.0], [1.0, 2.0, 1.0]) == Spread(20.0, 15.0, 25.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": 1}, {"a": True}),
        ({"a": 1}, OrderedDict(a=1)),
        ({"a": 0.0}, {"a": -0.0}),
        ([{"a": 1}], [{"a": 1}, {"a": 1}]),
        ([(1,)], [[1]]),
        (np.zeros(2), np.zeros(2, dtype="f4")),
        (np.zeros((1, 2)), np.zeros((2, 1))),
        (np.array([0.5, 1.5]), np.array([0.5, 2.5])),
        (np.array([None, 1], dtype=object), np.array([None, True], dtype=object)),
        ([np.float32(1)], [1.0]),
    ],
)
def test_outputs_that_are_not_alike_are_told_apart(theirs: Any, ours: Any) -> None:
    assert differs(theirs, ours) is not None
    assert differs(theirs, theirs) is None


def test_numpys_float_and_text_may_be_pythons() -> None:
    assert differs([{"a": np.float64(math.pi), "b": np.str_("x")}], [{"a": math.pi, "b": "x"}]) is None
    assert differs([np.float64(math.pi)], [3.14]) is not None


def reply_to(spans: list[Any], values: list[bytes], statuses: bytes = bytes(2)) -> Reply:
    return cast("Reply", SimpleNamespace(batch=SimpleNamespace(id=1, spans=spans), values=values, statuses=statuses))


def wrapped(value: bytes, offset: int, partition: int = 0) -> dict[str, Any]:
    source = {"topic": "in", "partition": partition, "offset": offset, "timestamp": 1_700_000_000_000 + offset - 7}
    return {"result": orjson.loads(value), "metrics": {"batch_size": 2}, "source": source, "task": TASK}


VALUES = [b'{"id":1}', b'{"id":2}']


def test_a_wrong_envelope_or_content_of_the_worker_is_noticed() -> None:
    spans = spans_of(VALUES, 7)
    good = [wrapped(VALUES[0], 7), wrapped(VALUES[1], 7, partition=1)]
    worker.verify(reply_to(spans, [orjson.dumps(it) for it in good]), "full")
    worker.verify(reply_to(spans, VALUES), "result")
    wrong: list[dict[str, Any]] = [
        {"result": {"id": 3}},
        {"source": good[1]["source"]},
        {"task": "another"},
        {"metrics": {"batch_size": 3}},
    ]
    for fields in wrong:
        with pytest.raises(AssertionError):
            worker.verify(reply_to(spans, [orjson.dumps({**good[0], **fields}), orjson.dumps(good[1])]), "full")
    with pytest.raises(AssertionError):
        worker.verify(reply_to(spans, VALUES[::-1]), "result")
    with pytest.raises(AssertionError):
        worker.verify(reply_to(spans, VALUES, statuses=b"\0\1"), "result")
    with pytest.raises(ValueError, match="shorter"):
        worker.verify(reply_to(spans, VALUES[:1]), "result")


def test_a_large_value_that_came_otherwise_is_noticed() -> None:
    verify = large_values.verifier([large_values.transport(VALUES)], "transport")
    seen = [orjson.dumps({"seen": it}) for it in large_values.transport(VALUES)]
    verify(reply_to([], seen))
    with pytest.raises(AssertionError):
        verify(reply_to([], seen[::-1]))
    with pytest.raises(AssertionError):
        large_values.verifier([VALUES], "identity")(reply_to([], VALUES[::-1]))


def test_every_way_of_pickling_is_held_to_its_results() -> None:
    batches = [VALUES, VALUES[::-1]]
    expected = [large_values.identity(values) for values in batches]
    for wrong in (False, True):
        told = expected[::-1] if wrong else expected

        def submit(values: Any) -> Callable[[], list[Any]]:
            return lambda: large_values.identity(values)

        if wrong:
            with pytest.raises(AssertionError):
                large_values.feed(submit, batches, told, 3)
        else:
            assert large_values.feed(submit, batches, told, 3) >= 0
