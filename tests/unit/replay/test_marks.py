"""The marks of replayed records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.replay.marks import COUNT, RUN, SOURCE, Source, count_of, counted, mark, run_of, source_of


@given(
    st.text(alphabet="abc._-", min_size=1),
    st.integers(0, 2**31),
    st.integers(0, 2**63),
    st.lists(st.sampled_from("xy")),
)
def test_a_mark_is_read_back_and_leaves_other_headers_in_their_order(
    topic: str, partition: int, offset: int, names: list[str]
) -> None:
    others = [(name, b"1") for name in names]
    marked = mark(mark(others, "first", Source("old", 0, 0)), "run 2", Source(topic, partition, offset))
    assert marked[: len(others)] == others
    assert len(marked) == len(others) + 2
    assert run_of(marked) == "run 2"
    assert source_of(marked) == Source(topic, partition, offset)


@pytest.mark.parametrize("value", [b"", b"in", b"in/1", b"in/1/x", b"in/-1/2", b"in/1/2/3", b"\xff", None])
def test_an_odd_source_is_none(value: bytes | None) -> None:
    assert source_of([(SOURCE, value)]) is None


def test_a_count_replaces_the_one_before_it() -> None:
    headers = counted(counted([("a", b"1")], 1), 2)
    assert headers == [("a", b"1"), (COUNT, b"2")]
    assert count_of(headers) == 2
    assert count_of([(COUNT, b"many")]) == count_of([]) == 0


def test_of_several_marks_the_last_one_counts() -> None:
    assert run_of([(RUN, b"one"), (RUN, b"two")]) == "two"
    assert run_of([]) is None
