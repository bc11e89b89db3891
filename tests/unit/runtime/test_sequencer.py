"""The three orders: what may be written when, and that nothing is lost or written twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.records import Outcome, Span
from streamproc.runtime.sequencer import KeyOrder, PartitionOrder, Sequencer, Unordered, make_sequencer
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


def pieces(draw: st.DrawFn, parts: int) -> list[Span]:
    """Spans of two partitions with keys, some of them split as isolation splits them."""
    result: list[Span] = []
    for partition in range(2):
        one, first = lease(partition), 0
        for _ in range(parts):
            count = draw(st.integers(1, 4))
            keys = [draw(st.sampled_from([b"a", b"b", None])) for _ in range(count)]
            result.append(span(one, first, count, keys=keys))
            first += count
    return result


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[Span], list[Span]]:
    """Spans in reading order, and pieces of them in the order in which workers finish."""
    spans = pieces(draw, draw(st.integers(1, 4)))
    finished: list[Span] = []
    for it in spans:
        cut = draw(st.integers(0, len(it.records) - 1))
        finished.extend(it.split(cut) if cut else (it,))
    return spans, draw(st.permutations(finished))


def run(sequencer: Sequencer, stream: tuple[list[Span], list[Span]]) -> list[tuple[int, int, bytes | None]]:
    spans, finished = stream
    for it in spans:
        sequencer.expect(it)
    return [
        (record.partition, record.offset, record.key)
        for it in finished
        for released in sequencer.complete(outcome(it))
        for record in released.span.records
    ]


@given(streams())
@settings(max_examples=200, deadline=None)
def test_partition_order_releases_each_record_once_in_reading_order(stream: tuple[list[Span], list[Span]]) -> None:
    released = run(PartitionOrder(), stream)
    for partition in range(2):
        expected = [r.offset for it in stream[0] for r in it.records if r.partition == partition]
        assert [offset for p, offset, _ in released if p == partition] == expected


@given(streams())
@settings(max_examples=200, deadline=None)
def test_key_order_releases_each_record_once_in_reading_order_of_its_key(
    stream: tuple[list[Span], list[Span]],
) -> None:
    released = run(KeyOrder(), stream)
    for partition in range(2):
        for key in (b"a", b"b", None):
            expected = [r.offset for it in stream[0] for r in it.records if (r.partition, r.key) == (partition, key)]
            assert [offset for p, offset, k in released if (p, k) == (partition, key)] == expected


@given(streams())
@settings(max_examples=200, deadline=None)
def test_key_order_holds_a_record_back_only_for_an_earlier_one_of_its_key(
    stream: tuple[list[Span], list[Span]],
) -> None:
    spans, finished = stream
    sequencer = KeyOrder()
    for it in spans:
        sequencer.expect(it)
    done: set[tuple[int, int]] = set()
    released: set[tuple[int, int]] = set()
    order = [(r.partition, r.offset, r.key) for it in spans for r in it.records]
    for it in finished:
        done |= {(r.partition, r.offset) for r in it.records}
        released |= {(r.partition, r.offset) for out in sequencer.complete(outcome(it)) for r in out.span.records}
        expected = {
            (partition, offset)
            for partition, offset, key in order
            if all((p, o) in done for p, o, k in order if (p, k) == (partition, key) and o <= offset)
        }
        assert released == expected
