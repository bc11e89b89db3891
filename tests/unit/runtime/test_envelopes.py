"""Dead letters: what their headers say, that they fit their topic, and what is left out or cut first."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.records import BatchReport, Cause, Failure, TopicPartition
from streamproc.runtime.codec import shorten
from streamproc.runtime.envelopes import dead_letter_row, result_rows, row_bytes
from tests.support.spans import FakeRecord, batch, lease, span

REPORT = BatchReport(batch([span(lease(), 0, 1)], attempt=4), worker=2, metrics=b"{}", attempts=4)
RAISED = Failure(Cause.EXCEPTION, "execute", "ValueError", "it is wrong", traceback='  File "a.py", line 3\nValueError')
PARTITION = TopicPartition("in", 0)
RECORD = FakeRecord(offset=7, key=b"k", value=b"x" * 2_000, headers=[("theirs", b"1")])


def headers(failure: Failure, limit_bytes: int = 1_000_000) -> dict[str, bytes | None]:
    return dict(dead_letter_row(PARTITION, RECORD, failure, REPORT, limit_bytes)[3])


def test_a_dead_letter_says_why_where_and_after_how_many_attempts() -> None:
    assert headers(RAISED) == {
        "theirs": b"1",
        "streamproc-source-topic": b"in",
        "streamproc-source-partition": b"0",
        "streamproc-source-offset": b"7",
        "streamproc-task": b"text",
        "streamproc-cause": b"exception",
        "streamproc-stage": b"execute",
        "streamproc-error-type": b"ValueError",
        "streamproc-error-message": b"it is wrong",
        "streamproc-attempts": b"4",
        "streamproc-worker": b"2",
        "streamproc-error-traceback": b'  File "a.py", line 3\nValueError',
    }


def test_a_result_alone_has_the_facts_of_the_envelope_in_its_headers() -> None:
    later = FakeRecord(offset=9, timestamp=17)
    ((_, key, value, told), second) = result_rows(PARTITION, [RECORD, later], [b"{}", b"[]"], REPORT)
    assert (key, value, dict(told)) == (
        b"k",
        b"{}",
        {
            "theirs": b"1",
            "streamproc-source-topic": b"in",
            "streamproc-source-partition": b"0",
            "streamproc-source-offset": b"7",
            "streamproc-source-timestamp": b"%d" % RECORD.timestamp,
            "streamproc-task": b"text",
            "streamproc-metrics": b"{}",
        },
    )
    found = dict(second[3])
    assert (second[2], found["streamproc-source-offset"], found["streamproc-source-timestamp"]) == (b"[]", b"9", b"17")
    versioned = BatchReport(REPORT.batch, 2, b"{}", 4, backend_version="2024-05")
    ((_, _, _, told),) = result_rows(PARTITION, [RECORD], [b"{}"], versioned)
    assert dict(told)["streamproc-backend-version"] == b"2024-05"
    assert told[-1][0] == "streamproc-metrics", "by which a result is told from a dead letter that it once was"


def test_a_record_that_the_backend_never_saw_was_attempted_once() -> None:
    found = headers(Failure(Cause.INVALID, "schema", "SchemaViolation", "no"))
    assert found["streamproc-attempts"] == b"1"
    assert "streamproc-error-traceback" not in found


def test_the_traceback_is_left_out_before_anything_of_the_record_is_cut() -> None:
    whole = row_bytes(dead_letter_row(PARTITION, RECORD, RAISED, REPORT, 1_000_000))
    for limit in range(whole - 500, whole + 400):
        _, key, value, found = dead_letter_row(PARTITION, RECORD, RAISED, REPORT, limit)
        assert row_bytes((None, key, value, found)) <= limit
        if ("streamproc-error-traceback", RAISED.traceback.encode()) not in found:
            continue
        assert (key, value) == (RECORD.key, RECORD.value)
        assert not [name for name, _ in found if "cut" in name]
    assert "streamproc-error-traceback" not in headers(RAISED, whole)
    assert "streamproc-error-traceback" in headers(RAISED, whole + 200)


def sized(most: int) -> st.SearchStrategy[bytes]:
    return st.integers(0, most).map(lambda size: b"x" * size)


@given(
    limit=st.integers(2_048, 20_000),
    topic=st.sampled_from(["in", "t" * 249]),
    key=st.none() | sized(30_000),
    value=st.none() | sized(30_000),
    # None that looks like ours: Hypothesis finds such words in this very file.
    headers=st.lists(
        st.tuples(st.text(max_size=300).filter(lambda it: "cut" not in it), st.none() | sized(9_000)), max_size=4
    ),
    kind=st.sampled_from(["E" * 100, "𝔈" * 100]),
    message=st.builds(str.__mul__, st.text(max_size=9), st.integers(0, 400)).map(shorten),
    traceback=st.text(st.characters(exclude_categories=["Cs"]), max_size=500),
)
@settings(max_examples=300, deadline=None)
def test_any_dead_letter_fits_and_says_what_was_cut(
    *,
    limit: int,
    topic: str,
    key: bytes | None,
    value: bytes | None,
    headers: list[tuple[str, bytes | None]],
    kind: str,
    message: str,
    traceback: str,
) -> None:
    record = FakeRecord(offset=2**63 - 1, topic=topic, key=key, value=value, headers=headers)
    row = dead_letter_row(
        PARTITION, record, Failure(Cause.EXCEPTION, "transform_outputs", kind, message, traceback), REPORT, limit
    )
    assert row_bytes(row) <= limit
    marks = dict(row[3])
    if "streamproc-headers-cut" in marks:
        assert marks["streamproc-headers-cut"] == b"%d" % len(headers)
    else:
        assert row[3][: len(headers)] == headers
    if "streamproc-key-cut-from-bytes" in marks:
        assert (row[1], marks["streamproc-key-cut-from-bytes"]) == (None, b"%d" % len(key or b""))
    else:
        assert row[1] == key
    if "streamproc-value-cut-from-bytes" in marks:
        assert marks["streamproc-value-cut-from-bytes"] == b"%d" % len(value or b"")
        assert bytes(row[2] or b"") == (value or b"")[: len(row[2] or b"")]
    else:
        assert row[2] == value
    if "streamproc-error-traceback" in marks:
        assert marks["streamproc-error-traceback"] == traceback.encode()
        assert not [name for name in marks if "cut" in name]
    said = (marks["streamproc-error-message"] or b"").decode()
    assert said == message or (said.endswith("…") and message.startswith(said[:-1]))


def test_a_long_message_of_wide_characters_is_cut_to_a_small_topic() -> None:
    message = "😀" * 1_000
    row = dead_letter_row(
        PARTITION, FakeRecord(1), Failure(Cause.EXCEPTION, "execute", "ValueError", message), REPORT, 2_048
    )
    assert row_bytes(row) <= 2_048
    said = dict(row[3])["streamproc-error-message"]
    assert said is not None
    assert said.decode().removesuffix("…") == "😀" * ((len(said) - 3) // 4)
    assert len(said) > 800
