"""Golden files: what is compared, what a failure says, and when a file is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from streamproc.broker.memory_log import MemoryRecord
from streamproc.records import Cause
from streamproc.replay.capture_file import read_capture
from streamproc.replay.dead_letters import Letter
from streamproc.replay.marks import Source
from streamproc.replay.results import Result
from streamproc.testing import GoldenError, Outputs, assert_golden, golden
from tests.unit.replay.test_dead_letters import letter_of


@pytest.fixture
def updating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "update", True)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "golden" / "texts.jsonl"
    assert not list(tmp_path.glob("golden/new-*"))


def outputs_of(values: Sequence[Any], *, first: int = 0, dead: Sequence[str] = (), time_ms: int = 1) -> Outputs:
    """Results with these values of neighbouring records from offset ``first`` on, then dead letters of these causes."""
    sent = [MemoryRecord("in", 2, first + it, time_ms, b"k%d" % it, b"{}") for it in range(len(values) + len(dead))]
    results = [
        Result("text", Source("in", 2, it.offset), it.key, value, None, time_ms, {"batch_size": time_ms}, time_ms)
        for it, value in zip(sent, values, strict=False)
    ]
    return Outputs(sent, results, [_letter(it, cause) for it, cause in zip(sent[len(values) :], dead, strict=True)], [])


def _letter(record: MemoryRecord, cause: str) -> Letter:
    found = letter_of(record.value, cause=Cause(cause), message=f"at {record.timestamp}")
    return Letter(
        record,
        Source(record.topic, record.partition, record.offset),
        **{name: getattr(found, name) for name in ("task", "cause", "stage", "error_type", "message", "attempts")},
        worker="0",
        traceback="",
        headers=[],
        cut={},
    )


def test_without_a_file_it_fails_and_says_how_to_write_one(file: Path) -> None:
    with pytest.raises(GoldenError, match=r"there is no golden file .*texts\.jsonl; `pytest --streamproc-update"):
        assert_golden(outputs_of([{"a": 1}]), file)
    assert not file.exists()


@pytest.mark.usefixtures("updating")
def test_what_was_written_passes_wherever_and_whenever_the_records_were(file: Path, monkeypatch: Any) -> None:
    assert_golden(outputs_of([{"a": 1}, {"a": 2.5}], dead=["rejected"]), file)
    written = file.read_bytes()
    monkeypatch.setattr(golden, "update", False)
    assert_golden(outputs_of([{"a": 1}, {"a": 2.5}], dead=["rejected"], first=40, time_ms=9), file)
    file.unlink()
    monkeypatch.setattr(golden, "update", True)
    assert_golden(outputs_of([{"a": 1}, {"a": 2.5}], dead=["rejected"], first=40, time_ms=1), file)
    assert file.read_bytes() == written
    assert [it.topic for it in read_capture(file)] == ["results", "results", "dead"]


@pytest.fixture
def looked_at(file: Path, updating: None, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: ARG001 - writes the file
    assert_golden(outputs_of([{"score": 1.0, "text": "a"}, {"score": 2.0, "text": "b"}], dead=["invalid"]), file)
    monkeypatch.setattr(golden, "update", False)
    return file


def test_a_difference_is_told_by_record_and_field(looked_at: Path) -> None:
    now = outputs_of([{"score": 1.0, "text": "a"}, {"score": 2.5, "text": "c"}], dead=["invalid"])
    with pytest.raises(GoldenError) as caught:
        assert_golden(now, looked_at)
    assert str(caught.value).splitlines() == [
        f"1 of 3 results are not those of {looked_at}:",
        "  record 1 of in, task text, key k1: changed",
        "    score: 2.0 → 2.5",
        '    text: "b" → "c"',
        "look at them; where they are right, `pytest --streamproc-update-golden` writes them into the file",
    ]


def test_tolerances_and_ignored_fields_let_differences_pass(looked_at: Path) -> None:
    now = outputs_of([{"score": 1.04, "text": "a"}, {"score": 2.0, "text": "c"}], dead=["invalid"])
    assert_golden(now, looked_at, tolerance="5%", ignore=["text"])
    assert_golden(now, looked_at, fields={"score": 0.05}, ignore=["text"])
    with pytest.raises(GoldenError, match=r"score: 1\.0 → 1\.04"):
        assert_golden(now, looked_at, fields={"score": 0.03}, ignore=["text"])


def test_what_is_missing_more_or_failed_is_told(looked_at: Path) -> None:
    with pytest.raises(GoldenError, match=r"record 2 of in, .*key k2: missing\n +golden: dead letter .*invalid"):
        assert_golden(outputs_of([{"score": 1.0, "text": "a"}, {"score": 2.0, "text": "b"}]), looked_at)
    more = outputs_of([{"score": 1.0, "text": "a"}, {"score": 2.0, "text": "b"}], dead=["invalid", "oom"])
    with pytest.raises(GoldenError, match=r"1 of 4 results .*\n +record 3 .*extra\n +golden: nothing\n +now: "):
        assert_golden(more, looked_at)
    failed = outputs_of([{"score": 1.0, "text": "a"}], dead=["crash", "invalid"])
    with pytest.raises(GoldenError, match=r"record 1 of in, .*failed\n +golden: .*2\.0.*\n +now: +dead letter .*crash"):
        assert_golden(failed, looked_at)


def test_a_file_is_written_anew_only_where_results_differ(looked_at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = looked_at.read_bytes()
    monkeypatch.setattr(golden, "update", True)
    close = outputs_of([{"score": 1.0 + 1e-9, "text": "a"}, {"score": 2.0, "text": "b"}], dead=["invalid"])
    assert_golden(close, looked_at)
    assert looked_at.read_bytes() == before
    changed = outputs_of([{"score": 7.0, "text": "a"}, {"score": 2.0, "text": "b"}], dead=["invalid"])
    assert_golden(changed, looked_at)
    monkeypatch.setattr(golden, "update", False)
    assert_golden(changed, looked_at)


def test_records_of_topics_are_compared_as_they_are(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (("streamproc-source-topic", b"in"), ("streamproc-source-partition", b"0"))
    records = [
        MemoryRecord(
            "in.results", 0, it, 5, None, b'{"a": %d}' % it, (*source, ("streamproc-source-offset", b"%d" % it))
        )
        for it in range(3)
    ]
    monkeypatch.setattr(golden, "update", True)
    assert_golden(records, file)
    monkeypatch.setattr(golden, "update", False)
    assert_golden(list(reversed(records)), file)
    with pytest.raises(GoldenError, match="missing"):
        assert_golden(records[:2], file)


def test_more_differences_than_can_be_read_are_counted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "update", True)
    assert_golden(outputs_of([{"a": it} for it in range(50)]), file)
    monkeypatch.setattr(golden, "update", False)
    with pytest.raises(GoldenError) as caught:
        assert_golden(outputs_of([{"a": -it - 1} for it in range(50)]), file)
    assert len(str(caught.value).splitlines()) == 1 + 2 * 10 + 1 + 1
    assert "  … and 40 more" in str(caught.value)
