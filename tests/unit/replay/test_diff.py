"""Matching by source record against a brute-force model, and what comes of it: verdicts, fields, examples, metrics."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.broker.memory_log import MemoryRecord
from streamproc.replay.diff import BASELINE, CANDIDATE, Comparison, Limit, Verdict, metrics_of
from streamproc.replay.values import Pattern, Rules, Tolerance


def result(  # what a processor writes with the full envelope
    offset: int,
    value: Any,
    *,
    partition: int = 0,
    task: str = "text",
    metrics: dict[str, Any] | None = None,
    at: int = 1_000,
    written: int = 1_250,
    key: bytes | None = b"k",
) -> MemoryRecord:
    source = {"topic": "texts", "partition": partition, "offset": offset, "timestamp": at}
    document = {"result": value, "metrics": metrics or {}, "source": source, "task": task}
    return MemoryRecord("texts.results", 0, offset, written, key, json.dumps(document).encode())


def dead(offset: int, cause: str = "exception", message: str = "no", partition: int = 0) -> MemoryRecord:
    headers = {
        "streamproc-source-topic": "texts",
        "streamproc-source-partition": str(partition),
        "streamproc-source-offset": str(offset),
        "streamproc-task": "text",
        "streamproc-cause": cause,
        "streamproc-error-message": message,
    }
    pairs = tuple((name, value.encode()) for name, value in headers.items())
    return MemoryRecord("texts.dead", 0, offset, 1_100, b"k", b"{}", pairs)


def compared(
    baseline: list[MemoryRecord], candidate: list[MemoryRecord], rules: Rules | None = None, **options: Any
) -> Comparison:
    with Comparison(rules or Rules(), **options) as comparison:
        comparison.add_all(BASELINE, baseline)
        comparison.add_all(CANDIDATE, candidate)
        comparison.finish()
        return comparison


def verdicts(comparison: Comparison) -> dict[str, int]:
    return {verdict.value: count for verdict, count in comparison.verdicts.items() if count}


# A source is one of few, so that repetitions and matches happen; a value is one of four, or a dead letter.
arrivals = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([0, 1, 255, 256, 70_000]), st.integers(0, 1), st.integers(0, 4)),
    max_size=40,
)


def arrival(offset: int, partition: int, value: int) -> MemoryRecord:
    return dead(offset, partition=partition) if value == 4 else result(offset, {"n": value}, partition=partition)


@given(arrivals, st.sampled_from([0, 60, 1 << 20]))
def test_in_whatever_order_the_sides_come_each_source_has_the_verdict_of_a_model_that_keeps_everything(
    given_arrivals: list[tuple[int, int, int, int]], held_bytes: int
) -> None:
    sides: tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]] = ({}, {})
    repeated = [0, 0]
    with Comparison(Rules(), examples=1_000, held_bytes=held_bytes) as comparison:
        for side, offset, partition, value in given_arrivals:
            comparison.add(side, arrival(offset, partition, value))
            if (partition, offset) in sides[side]:
                repeated[side] += 1
            else:
                sides[side][partition, offset] = value
        waiting = sides[0].keys() ^ sides[1].keys()
        assert comparison.waiting == len(waiting)
        comparison.finish()
        expected = {it: _verdict(sides[0].get(it), sides[1].get(it)) for it in sides[0].keys() | sides[1].keys()}
        assert comparison.verdicts == Counter(expected.values())
        assert [it.repeated for it in comparison.sides] == repeated
        shown = {(it.source.partition, it.source.offset): it.verdict for it in comparison.examples}
        assert shown == {it: verdict for it, verdict in expected.items() if verdict is not Verdict.EQUAL}
        for it in comparison.examples:
            before, after = (side.get((it.source.partition, it.source.offset)) for side in sides)
            for held, expected_value in ((it.baseline, before), (it.candidate, after)):
                assert (held is None) == (expected_value is None)
                if held is not None:
                    assert held.is_dead == (expected_value == 4)
                    assert held.key == b"k"
                    assert held.is_dead or held.value == {"n": expected_value}


def _verdict(before: int | None, after: int | None) -> Verdict:
    if before is None:
        return Verdict.EXTRA
    if after is None:
        return Verdict.MISSING
    if before == after:
        return Verdict.EQUAL
    return Verdict.FAILED if after == 4 else Verdict.MENDED if before == 4 else Verdict.CHANGED


def test_numbers_within_their_tolerance_are_close_and_the_rest_is_changed() -> None:
    rules = Rules(Tolerance(), {Pattern.parse("score"): Tolerance(0.01)})
    before = [result(0, {"score": 0.5}), result(1, {"score": 0.5}), result(2, {"score": 0.5}), result(3, {"a": 0.5})]
    after = [result(0, {"score": 0.5}), result(1, {"score": 0.505}), result(2, {"score": 0.6}), result(3, {"a": 0.505})]
    found = compared(before, after, rules)
    assert verdicts(found) == {"equal": 1, "close": 1, "changed": 2}
    fields = {it.path: it for it in found.fields.values()}
    assert (fields["score"].close, fields["score"].changed) == (1, 1)
    assert fields["score"].max_size == pytest.approx(0.1)
    assert fields["score"].mean_size == pytest.approx(0.0525)
    assert fields["score"].pairs == [(0.5, 0.6)]
    assert [it.path for it in found.worst_fields()] == ["score", "a"]


def test_a_label_that_changed_is_counted_by_what_it_was_and_has_become() -> None:
    before = [result(offset, {"label": "a" if offset < 3 else 0.5}) for offset in range(5)]
    after = [result(offset, {"label": "c"}) for offset in range(5)]
    (field,) = compared(before, after).fields.values()
    assert field.transitions.most_common() == [(('"a"', '"c"'), 3), (("0.5", '"c"'), 2)]


def test_dead_letters_are_the_same_by_their_cause() -> None:
    before = [dead(0, message="worker 1"), dead(1), dead(2), result(3, {})]
    after = [dead(0, message="worker 2"), dead(1, "timeout"), result(2, {}), dead(3)]
    found = compared(before, after)
    assert verdicts(found) == {"equal": 1, "changed": 1, "mended": 1, "failed": 1}
    assert [it.causes for it in found.sides] == [{"exception": 3}, {"exception": 2, "timeout": 1}]


def test_results_of_several_tasks_are_told_apart_unless_their_task_is_ignored() -> None:
    before, after = [result(0, 1, task="a"), result(0, 2, task="b")], [result(0, 2, task="b"), result(0, 1, task="a")]
    assert verdicts(compared(before, after)) == {"equal": 2}
    renamed = [result(0, 1, task="a")], [result(0, 1, task="c")]
    assert verdicts(compared(*renamed)) == {"missing": 1, "extra": 1}
    assert verdicts(compared(*renamed, ignore_task=True)) == {"equal": 1}


def test_of_each_kind_of_difference_so_many_examples_are_kept() -> None:
    before = [result(offset, offset) for offset in range(10)]
    after = [result(offset, offset + 1) for offset in range(5)] + [result(offset, 0) for offset in range(10, 20)]
    found = compared(before, after, examples=2)
    assert Counter(it.verdict for it in found.examples) == {"changed": 2, "missing": 2, "extra": 2}
    assert [it.source.offset for it in found.examples] == [0, 1, 5, 6, 10, 11]


def test_records_that_are_nobodys_results_are_told() -> None:
    found = compared([MemoryRecord("other", 0, 0, 1, None, b"{}")], [result(0, 1)])
    assert (found.sides[BASELINE].without_source, verdicts(found)) == (1, {"extra": 1})


def batch(size: int, execute: float, first: int, written: int) -> list[MemoryRecord]:
    times = {"preprocess": 0.1, "transform_inputs": None, "execute": execute}
    metrics = {"batch_size": size, "execution_times": times, "total_execution_time": execute + 0.1, "queue_time": 3}
    return [result(first + it, {}, metrics=metrics, written=written) for it in range(size)]


def test_metrics_are_set_side_by_side_a_batch_counting_once_and_are_no_differences() -> None:
    before = [*batch(1, 1.0, 0, 2_000), *batch(1, 1.0, 1, 2_000), *batch(8, 4.0, 2, 3_000)]
    after = [*batch(10, 8.0, 0, 6_000)]
    found = compared(before, after)
    assert verdicts(found) == {"equal": 10}
    rows = {f"{it.name} {it.quantile}".strip(): (it.baseline, it.candidate, it.ratio) for it in metrics_of(found.sides)}
    assert rows["throughput"] == (10.0, None, None)
    assert rows["batch size p50"] == (1.0, 10.0, 10.0)
    assert rows["batch size p95"] == (8.0, 10.0, 1.25)
    assert rows["execute p50"] == pytest.approx((1, 8, 8), rel=0.011)
    assert rows["latency p50"][1] == 5_000.0
    assert "transform_inputs p50" not in rows
    assert rows["queue p50"][2] == 1.0


def test_what_waits_beyond_its_memory_is_in_a_file_that_is_emptied_when_all_of_it_is_matched() -> None:
    with Comparison(Rules(), held_bytes=0) as comparison:
        for _ in range(2):
            base = comparison.records
            comparison.add_all(BASELINE, [result(base + offset, "x" * 100) for offset in range(100)])
            file = comparison._store._file  # how large it is cannot be seen from outside
            assert file is not None
            file.flush()
            assert 10_000 < file.seek(0, 2) < 20_000
            comparison.add_all(CANDIDATE, [result(base + offset, "x" * 100) for offset in range(100)])
            assert file.seek(0, 2) == 0
        assert verdicts(comparison) == {"equal": 200}


def test_further_fields_are_counted_together() -> None:
    names = [{f"f{number}": number} for number in range(1_200)]
    found = compared([result(0, {})], [result(0, {name: 1 for it in names for name in it})])
    assert len(found.fields) == 1_001
    assert found.fields["(further fields)"].changed == 200


@pytest.mark.parametrize(
    ("limit", "differing", "records", "allowed"),
    [("0", 0, 10, True), ("0", 1, 10, False), ("5", 5, 10, True), ("5%", 5, 100, True), ("5%", 6, 100, False)],
)
def test_a_limit_is_a_number_or_a_share_of_the_records(limit: str, differing: int, records: int, allowed: bool) -> None:
    assert Limit.parse(limit).allows(differing, records) is allowed


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf", "%"])
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no limit"):
        Limit.parse(text)


def test_everything_is_ready_for_json() -> None:
    before = [result(0, {"a": 1}), result(1, {"s": 0.1}), result(2, {}), dead(4)]
    after = [result(0, {}), result(1, {"s": 0.2}), result(3, {}), result(4, {})]
    document = json.loads(json.dumps(compared(before, after).as_json(Limit.parse("10%"))))
    assert (document["passed"], document["records"], document["differing"]) == (False, 5, 5)
    assert {it: count for it, count in document["verdicts"].items() if count} == {
        "changed": 2,
        "mended": 1,
        "missing": 1,
        "extra": 1,
    }
    assert len(document["verdicts"]) == len(Verdict)
    example = document["examples"][0]
    assert example["changes"] == [{"path": "a", "baseline": 1}]
    assert example["source"] == {"topic": "texts", "partition": 0, "offset": 0}
