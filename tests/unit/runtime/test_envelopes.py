"""Dead letters: what their headers say, and what is left out first where the topic takes no more."""

from __future__ import annotations

from streamproc.records import BatchReport, Cause, Failure
from streamproc.runtime.envelopes import dead_letter_row, row_bytes
from tests.support.spans import FakeRecord, batch, lease, span

REPORT = BatchReport(batch([span(lease(), 0, 1)], attempt=4), worker=2, metrics=b"{}", attempts=4)
RAISED = Failure(Cause.EXCEPTION, "execute", "ValueError", "it is wrong", traceback='  File "a.py", line 3\nValueError')
RECORD = FakeRecord(offset=7, key=b"k", value=b"x" * 2_000, headers=[("theirs", b"1")])


def headers(failure: Failure, limit_bytes: int = 1_000_000) -> dict[str, bytes | None]:
    return dict(dead_letter_row(RECORD, failure, REPORT, limit_bytes)[3])


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


def test_a_record_that_the_backend_never_saw_was_attempted_once() -> None:
    found = headers(Failure(Cause.INVALID, "schema", "SchemaViolation", "no"))
    assert found["streamproc-attempts"] == b"1"
    assert "streamproc-error-traceback" not in found


def test_the_traceback_is_left_out_before_anything_of_the_record_is_cut() -> None:
    whole = row_bytes(dead_letter_row(RECORD, RAISED, REPORT, 1_000_000))
    for limit in range(whole - 500, whole + 400):
        _, key, value, found = dead_letter_row(RECORD, RAISED, REPORT, limit)
        assert row_bytes((None, key, value, found)) <= limit
        if ("streamproc-error-traceback", RAISED.traceback.encode()) not in found:
            continue
        assert (key, value) == (RECORD.key, RECORD.value)
        assert not [name for name, _ in found if "cut" in name]
    assert "streamproc-error-traceback" not in headers(RAISED, whole)
    assert "streamproc-error-traceback" in headers(RAISED, whole + 200)
