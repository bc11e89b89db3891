"""Capture files: what is written is read, byte for byte; what is broken is said with file and line."""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from streamproc.record_lines import PlacedRecord
from streamproc.replay import capture_file
from streamproc.replay.capture_file import CaptureFileError, LineWriter, read_capture, write_capture

FORMATS = ["records.jsonl", "records.jsonl.gz", "records.parquet"]

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_tricky = st.sampled_from(
    [
        b"null",
        b" null",
        b'{"$text": 1}',
        b'{"$base64":"x"}',
        b' {"a" : 1} ',
        b'{"a":\r\n1}',
        b'{"b":2,"value":{"value":3}}',
        b'1,"value":2',
        b"12345678901234567890123456789012345678901234567890",
        b"1.0000000000000000000000000001",
        b"NaN",
        b"}",
    ]
)
_names = st.text(max_size=8) | st.sampled_from(["value", ",", ',"value":', "$text"])
_bytes = st.binary(max_size=10) | st.sampled_from([b"value", b",", b',"value":', b"$text", b""])
_records = st.builds(
    PlacedRecord,
    topic=st.text("abc-_.", min_size=1, max_size=5),
    partition=st.integers(0, 99),
    offset=st.integers(0, 2**62),
    timestamp=st.integers(-1, 2**45),
    key=st.none() | _bytes,
    value=st.none()
    | st.binary(max_size=30)
    | _tricky
    | _json.map(lambda it: json.dumps(it).encode())
    | _json.map(lambda it: json.dumps(it, indent=1, ensure_ascii=False).encode()),
    headers=st.lists(st.tuples(_names, st.none() | _bytes), max_size=3),
)


def _write(path: Path, records: Sequence[PlacedRecord]) -> None:
    with write_capture(path) as writer:
        writer.write(records)


def _record(offset: int, value: bytes | None = b"{}") -> PlacedRecord:
    return PlacedRecord("t", 0, offset, 1_700_000_000_000 + offset, b"k", value, [("h", b"v")])


@pytest.mark.parametrize("name", FORMATS)
@hypothesis_settings(max_examples=60)
@given(records=st.lists(_records, max_size=5))
def test_what_is_written_is_read_byte_for_byte(name: str, records: list[PlacedRecord]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        _write(path, records)
        assert list(read_capture(path)) == records


@pytest.mark.parametrize("name", FORMATS)
def test_many_records_come_back_from_several_members_and_row_groups(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_file, "MEMBER_BYTES", 500)
    monkeypatch.setattr(capture_file, "_ROW_GROUP_ROWS", 7)
    records = [_record(offset, b"[%d]" % offset) for offset in range(100)]
    with write_capture(tmp_path / name) as writer:
        for record in records:
            writer.write([record])
    assert list(read_capture(tmp_path / name)) == records


@given(st.lists(_records, max_size=20), st.integers(1, 5))
def test_how_records_are_handed_over_does_not_show_in_a_compressed_file(records: list[PlacedRecord], step: int) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_file, "MEMBER_BYTES", 300)
        together, apart = Path(directory) / "a.gz", Path(directory) / "b.gz"
        _write(together, records)
        with write_capture(apart) as writer:
            for first in range(0, len(records), step):
                writer.write(records[first : first + step])
        assert together.read_bytes() == apart.read_bytes()


def test_lines_are_as_consume_full_writes_them(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", [_record(3, b'{"x": 1}')])
    assert (tmp_path / "a.jsonl").read_text() == (
        '{"topic":"t","partition":0,"offset":3,"timestamp":1700000000003,"key":"k","headers":[["h","v"]],'
        '"value":{"x": 1}}\n'
    )


def test_lines_that_a_person_has_edited_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{ "value": {"x": 1}, "topic": "t", "partition": 0, "offset": 1, "timestamp": 5,'
        ' "headers": {"a": "b", "value": "c"}}\n\n'
        '{"topic": "t", "partition": 0, "offset": 2, "timestamp": 5, "headers": {"a": "b","value":"c"}, "value": 7}'
    )
    headers = [("a", b"b"), ("value", b"c")]
    assert list(read_capture(path)) == [
        PlacedRecord("t", 0, 1, 5, None, b'{"x":1}', headers),
        PlacedRecord("t", 0, 2, 5, None, b"7", headers),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", 'has no "value"'),
        ('{"value": 1}', "has no 'topic'"),
        ('{"topic":1,"partition":0,"offset":0,"timestamp":0,"value":1}', '"topic" is no text'),
        ('{"topic":"t","partition":"0","offset":0,"timestamp":0,"value":1}', "whole numbers"),
        ('{"topic":"t","partition":0,"offset":-1,"timestamp":0,"value":1}', "whole numbers"),
        ('{"topic":"t","partition":0,"offset":0,"timestamp":0,"key":5,"value":1}', '"key"'),
        ('{"topic":"t","partition":0,"offset":0,"timestamp":0,"headers":[1],"value":1}', '"headers"'),
        ('{"topic":"t","partition":0,"offset":0,"timestamp":0,"value":{"$base64":"!"}}', "not base64"),
    ],
)
def test_a_line_that_is_no_record_is_named_with_file_and_number(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    _write(path, [_record(0)])
    with path.open("a") as file:
        file.write(line + "\n")
    reading = read_capture(path)
    assert next(reading) == _record(0)
    with pytest.raises(CaptureFileError) as caught:
        next(reading)
    assert str(caught.value).startswith(f"{path}:2: the line ")
    assert reason in str(caught.value)


def test_a_file_that_ends_in_the_middle_of_a_record_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    _write(path, [_record(0), _record(1)])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CaptureFileError, match=r"a\.jsonl:2: the line ends in the middle of a record"):
        list(read_capture(path))


@pytest.mark.parametrize("cut", [1, 20])
def test_a_compressed_file_that_was_cut_says_so(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    _write(path, [_record(offset) for offset in range(5)])
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CaptureFileError, match="no gzip, or not to its end"):
        list(read_capture(path))


def test_what_is_no_gzip_or_no_parquet_says_so(tmp_path: Path) -> None:
    for name in FORMATS[1:]:
        (tmp_path / name).write_text("hello")
        with pytest.raises(CaptureFileError, match=r"no gzip|no capture file as Parquet"):
            list(read_capture(tmp_path / name))


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_never_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(CaptureFileError, match="is there already"):
        write_capture(tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(CaptureFileError, match=r"cannot be read \(No such file"):
        list(read_capture(tmp_path / name))


def test_parquet_that_another_program_wrote_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {
            "value": pyarrow.array(["{}", None]),
            "headers": pyarrow.array(
                [None, None], pyarrow.list_(pyarrow.struct({"name": "string", "value": "binary"}))
            ),
            "key": pyarrow.array(["a", None]).dictionary_encode(),
            "topic": pyarrow.array(["t", "t"]).dictionary_encode(),
            "partition": pyarrow.array([0, 1]),
            "offset": pyarrow.array([5, 6]),
            "timestamp": pyarrow.array([1_000_000, 2_000_000], pyarrow.timestamp("ns")),
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_capture(tmp_path / "a.parquet")) == [
        PlacedRecord("t", 0, 5, 1, b"a", b"{}", []),
        PlacedRecord("t", 1, 6, 2, None, None, []),
    ]
    parquet.write_table(table.drop_columns(["offset"]), tmp_path / "b.parquet")
    with pytest.raises(CaptureFileError, match="the column 'offset' is missing"):
        list(read_capture(tmp_path / "b.parquet"))


def test_without_pyarrow_parquet_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CaptureFileError, match=r"pip install 'streamproc\[parquet\]'"):
        write_capture(tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


def test_lines_are_appended_behind_those_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    _write(path, [_record(0)])
    with LineWriter(path, append=True) as writer:
        writer.write([_record(1)])
    assert list(read_capture(path)) == [_record(0), _record(1)]
    assert len(gzip.decompress(path.read_bytes()).splitlines()) == 2
