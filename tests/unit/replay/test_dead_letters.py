"""What dead letters say, the groups that they are in, and which of them a selection means."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.broker.memory_log import MemoryRecord
from streamproc.records import Batch, BatchReport, Cause, Failure, TopicPartition
from streamproc.replay import marks
from streamproc.replay.dead_letters import Fault, Faults, Letter, LetterError, Selection, normalised, read_letter
from streamproc.runtime.envelopes import dead_letter_row

NAMES = st.sampled_from(
    ["a", "trace-id", "streamproc-source-topic", "streamproc-task", "streamproc-cause", marks.COUNT, marks.RUN]
)
HEADERS = st.lists(st.tuples(NAMES, st.none() | st.binary(max_size=40)), max_size=8)
UNBOUNDED = 10_000_000


def letter_of(
    value: bytes | None = b"{}",
    *,
    headers: Any = (),
    key: bytes | None = None,
    limit_bytes: int = UNBOUNDED,
    message: str = "it is wrong",
    at: int = 0,
    task: str = "text",
    cause: Cause = Cause.EXCEPTION,
    kind: str = "ValueError",
) -> Letter:
    record = MemoryRecord("in", 3, 4_711, 1_000 + at, key, value, tuple(headers))
    report = BatchReport(Batch(1, task, [], 0.0, 0.0, "size", 1.0), worker=2, metrics=b"{}", attempts=4)
    failure = Failure(cause, "execute", kind, message, "  File x\nValueError")
    timestamp, key, cut, written = dead_letter_row(
        TopicPartition(record.topic, record.partition), record, failure, report, limit_bytes
    )
    assert timestamp is not None
    value = None if cut is None else bytes(cut)
    found = read_letter(MemoryRecord("in.dead", 0, at, timestamp, key, value, tuple(written)))
    assert found is not None
    return found


@given(HEADERS, st.none() | st.binary(max_size=300), st.none() | st.binary(max_size=300), st.integers(2_000, 4_000))
def test_a_letter_that_is_not_cut_has_the_record_as_it_came(
    headers: list[tuple[str, bytes | None]], key: bytes | None, value: bytes | None, limit_bytes: int
) -> None:
    letter = letter_of(value, headers=headers, key=key, limit_bytes=limit_bytes)
    assert letter.source == ("in", 3, 4_711)
    assert (letter.task, letter.cause, letter.stage, letter.error_type) == (
        "text",
        "exception",
        "execute",
        "ValueError",
    )
    assert not letter.cut
    assert (letter.headers, letter.record.key, letter.record.value) == (headers, key, value)


@given(st.integers(0, 3_000), st.integers(0, 3_000), st.integers(0, 3_000), st.integers(1_000, 5_000))
def test_whatever_is_missing_of_the_record_is_said(key: int, header: int, value: int, limit_bytes: int) -> None:
    letter = letter_of(b"v" * value, headers=[("h", b"h" * header)], key=b"k" * key, limit_bytes=limit_bytes)
    whole = {
        "value": letter.record.value == b"v" * value,
        "headers": letter.headers == [("h", b"h" * header)],
        "key": letter.record.key == b"k" * key,
    }
    assert set(letter.cut) == {part for part, there in whole.items() if not there}


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("a", b"1"),),
        (("streamproc-source-topic", b"in"), ("streamproc-source-partition", b"0"), ("streamproc-source-offset", b"1")),
        (
            ("streamproc-source-topic", b"in"),
            ("streamproc-source-partition", b"x"),
            ("streamproc-source-offset", b"1"),
            ("streamproc-cause", b"invalid"),
        ),
    ],
)
def test_what_is_no_dead_letter_is_none(headers: Any) -> None:
    assert read_letter(MemoryRecord("in.dead", 0, 0, 0, None, b"{}", headers)) is None


@pytest.mark.parametrize(
    ("messages", "same"),
    [
        (["record 37 is at fault", "record 4,711 is at fault"], "record # is at fault"),
        (["'int' object has no attribute 'x'", "'str' object has no attribute 'yy'"], "… object has no attribute …"),
        (["it's no 5", "it's no 6"], "it's no #"),
        (["at inference.py:24", "at inference.py:7"], "at inference.py:#"),
        (["x is -1.5e-3.", "x is 2."], "x is #."),
        (
            ["user 8c9f4f0e-7a53-4b59-a3c6-abcdefabcdef", "user aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"],
            "user #",
        ),
        (['no field "a b"', 'no field "c"'], "no field …"),
        (["two\n  lines", "two lines"], "two lines"),
    ],
)
def test_what_differs_from_record_to_record_is_left_out(messages: list[str], same: str) -> None:
    assert {normalised(message) for message in messages} == {same}


def test_other_words_are_another_fault() -> None:
    assert normalised("no such user 5") != normalised("no such order 5")


@given(st.text(max_size=2_000))
def test_any_message_has_a_short_form_of_its_own(message: str) -> None:
    short = normalised(message)
    assert len(short) <= 300
    assert normalised(message) == short


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1_000)), max_size=60), st.integers(1, 6))
def test_letters_are_counted_by_fault_and_the_rest_together(them: list[tuple[int, int]], most: int) -> None:
    faults = Faults(most)
    for which, at in them:
        faults.add(letter_of(at=at, kind=f"Error{which}"))
    assert len(faults.tallies) == min(most, len({which for which, _ in them}))
    assert faults.count == len(them)
    listed = faults.most_first()
    assert [tally.count for _, tally in listed] == sorted((tally.count for _, tally in listed), reverse=True)
    for fault, tally in listed:
        times = [1_000 + at for which, at in them if f"Error{which}" == fault.error_type]
        assert (tally.count, tally.first_ms, tally.last_ms) == (len(times), min(times), max(times))
        assert tally.example is not None
        assert tally.example.topic == "in.dead"


def test_a_fault_has_the_same_name_everywhere() -> None:
    assert letter_of(message="record 1 is bad").fault == letter_of(message="record 2 is bad", at=9).fault
    assert Fault("text", "exception", "execute", "ValueError", "record # is bad").id == "9da6e4cc"


VALUE = json.dumps({"user": {"id": 7, "name": "Ann"}, "big": 2**70, "ok": None}).encode()


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (Selection(), True),
        (Selection(tasks=("image", "text")), True),
        (Selection(tasks=("image",)), False),
        (Selection(causes=("exception",), error_types=("ValueError",)), True),
        (Selection(causes=("exception",), error_types=("KeyError",)), False),
        (Selection(message="is wrong"), True),
        (Selection(message="is.wrong"), False),
        (Selection(message="/^it is.wrong$/"), True),
        (Selection(message="/"), False),
        (Selection(where=(("user.id", "7"),)), True),
        (Selection(where=(("user.name", "Ann"), ("ok", "null"))), True),
        (Selection(where=(("user.name", '"Ann"'),)), True),
        (Selection(where=(("user.name", "Ann"), ("user.id", "8"))), False),
        (Selection(where=(("user.nobody", "Ann"),)), False),
        (Selection(replays=0), True),
        (Selection(replays=1), False),
        (Selection(faults=(letter_of().fault.id, "x")), True),
        (Selection(faults=("x",)), False),
    ],
)
def test_a_letter_is_chosen_when_all_that_is_said_is_so(selection: Selection, chosen: bool) -> None:
    assert (letter_of(VALUE) in selection) is chosen


def test_values_that_are_no_json_have_no_fields() -> None:
    for value in (b"{", b"\xff", b"[1]", b"", None):
        assert letter_of(value) not in Selection(where=(("user.id", "7"),))


def test_a_pattern_that_is_none_is_told_at_once() -> None:
    with pytest.raises(LetterError, match=r"--message /\(/ is no regular expression"):
        Selection(message="/(/")


def test_a_selection_is_described_in_one_order() -> None:
    one, other = Selection(causes=("a", "b"), message="x"), Selection(causes=("b", "a"), message="x")
    assert one.described() == other.described() == {"cause": ["a", "b"], "message": "x"}
    assert Selection().described() == {}
    assert Selection(replays=0).described() == {"replayed": 0}
