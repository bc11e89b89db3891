"""When a window closes, and what is in the batch."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.records import Batch
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


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    max_size=st.integers(1, 20),
    max_bytes=st.integers(1, 60),
)
@settings(max_examples=300, deadline=None)
def test_every_record_leaves_once_in_order_within_the_limits(
    sizes: list[int], lengths: list[int], max_size: int, max_bytes: int
) -> None:
    it = batcher(max_size=max_size, max_bytes=max_bytes)
    one, first = lease(), 0
    for index, count in enumerate(sizes):
        it.add(span(one, first, count, value=b"x" * lengths[index % len(lengths)]))
        first += count
    seen: list[int] = []
    while it.size:
        taken = it.take(0.0, "wait")
        seen.extend(offsets(taken))
        assert 0 < taken.size <= max_size
        assert taken.size_bytes <= max_bytes or taken.size == 1
        if it.size and taken.size < max_size:
            # Greedy: the next record would not have fitted.
            following = it.take(0.0, "wait")
            seen.extend(offsets(following))
            assert taken.size_bytes + len(following.spans[0].records[0].value or b"") > max_bytes
    assert seen == list(range(100, 100 + first))
    assert it.size_bytes == 0
