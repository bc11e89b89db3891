"""Dead letters fit their topic, whatever the record is, and say what was cut."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.records import BatchReport, Failure
from streamproc.runtime.codec import shorten
from streamproc.runtime.envelopes import dead_letter_row, row_bytes
from tests.support.spans import FakeRecord, batch, lease, span

REPORT = BatchReport(batch([span(lease(), 0, 1)]), worker=0, metrics=b"{}", attempts=3)


def sized(most: int) -> st.SearchStrategy[bytes]:
    return st.integers(0, most).map(lambda size: b"x" * size)


@given(
    limit=st.integers(2_048, 20_000),
    topic=st.sampled_from(["in", "t" * 249]),
    key=st.none() | sized(30_000),
    value=st.none() | sized(30_000),
    headers=st.lists(st.tuples(st.text(max_size=300), st.none() | sized(9_000)), max_size=4),
    message=st.builds(str.__mul__, st.text(max_size=9), st.integers(0, 400)).map(shorten),
)
@settings(max_examples=300, deadline=None)
def test_any_dead_letter_fits_and_says_what_was_cut(
    *,
    limit: int,
    topic: str,
    key: bytes | None,
    value: bytes | None,
    headers: list[tuple[str, bytes | None]],
    message: str,
) -> None:
    record = FakeRecord(offset=2**63 - 1, topic=topic, key=key, value=value, headers=headers)
    row = dead_letter_row(record, Failure("execute", "E" * 100, message), REPORT, limit)
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
    said = (marks["streamproc-error-message"] or b"").decode()
    assert said == message or (said.endswith("…") and message.startswith(said[:-1]))


def test_a_long_message_of_wide_characters_is_cut_to_a_small_topic() -> None:
    message = "😀" * 1_000
    row = dead_letter_row(FakeRecord(1), Failure("execute", "ValueError", message), REPORT, 2_048)
    assert row_bytes(row) <= 2_048
    said = dict(row[3])["streamproc-error-message"]
    assert said is not None
    assert said.decode().removesuffix("…") == "😀" * ((len(said) - 3) // 4)
    assert len(said) > 800
