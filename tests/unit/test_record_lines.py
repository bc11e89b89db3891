"""Records as lines of JSON, there and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.record_lines import Line, LineError, read_full, read_keyed, read_value, write_full, write_value


@dataclass(frozen=True)
class _Record:
    value: bytes | None
    key: bytes | None = None
    timestamp: int = 1_700_000_000_000
    headers: list[tuple[str, bytes | None]] = field(default_factory=list)
    topic: str = "topic"
    partition: int = 2
    offset: int = 41


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (b'{"a": 1}', b'{"a": 1}'),
        (b'{"big": 123456789012345678901234567890}', b'{"big": 123456789012345678901234567890}'),
        (b'{\r\n  "a": "b"\n}', b'{    "a": "b" }'),
        (b"[1,2]", b"[1,2]"),
        (None, b"null"),
        (b"null", b'{"$text":"null"}'),
        (b"plain text", b'{"$text":"plain text"}'),
        (b"", b'{"$text":""}'),
        (b"\xff\x00", b'{"$base64":"/wA="}'),
        (b'{"$text": 1}', b'{"$text":"{\\"$text\\": 1}"}'),
    ],
)
def test_a_value_is_one_line_of_json_and_comes_back(value: bytes | None, line: bytes) -> None:
    assert write_value(_Record(value)) == line
    json.loads(line)
    back = read_value(line).value
    assert back == value or json.loads(back or b"null") == json.loads(value or b"null")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_values = st.none() | st.binary(max_size=30) | _json.map(lambda it: json.dumps(it).encode())
_header_names = st.text(max_size=10)


@given(
    st.builds(
        _Record,
        value=_values,
        key=st.none() | st.binary(max_size=10),
        timestamp=st.integers(0, 2**48),
        headers=st.lists(st.tuples(_header_names, st.none() | st.binary(max_size=10)), max_size=3),
    )
)
def test_a_record_survives_the_way_through_a_full_line(record: _Record) -> None:
    line = write_full(record)
    assert b"\n" not in line
    back = read_full(line)
    assert back.key == record.key
    assert back.timestamp == record.timestamp
    assert list(back.headers) == record.headers
    if back.value != record.value:
        assert back.value is not None
        assert record.value is not None
        assert json.loads(back.value) == json.loads(record.value)


def test_a_full_line_says_where_the_record_stands() -> None:
    line = json.loads(write_full(_Record(b"{}", key=b"k", headers=[("h", b"v"), ("h", None)])))
    assert line == {
        "topic": "topic",
        "partition": 2,
        "offset": 41,
        "timestamp": 1_700_000_000_000,
        "key": "k",
        "headers": [["h", "v"], ["h", None]],
        "value": {},
    }


def test_a_full_line_may_be_written_by_hand() -> None:
    assert read_full(b'{"key": "k", "headers": {"a": "b"}, "value": {"x": 1}}') == Line(
        b'{"x":1}', b"k", None, [("a", b"b")]
    )


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (b'{"id": "a"}', b"a"),
        (b'{"id": 7}', b"7"),
        (b'{"id": null}', None),
        (b'{"id": {"b": [1]}}', b'{"b":[1]}'),
    ],
)
def test_a_key_is_a_fields_value(line: bytes, key: bytes | None) -> None:
    assert read_keyed(line, "id") == Line(line, key)


def test_a_key_may_be_nested() -> None:
    assert read_keyed(b'{"user": {"id": "a"}}', "user.id").key == b"a"


@pytest.mark.parametrize("line", [b'{"other": 1}', b"[]", b'{"id": {}}'])
def test_a_line_without_the_key_is_refused(line: bytes) -> None:
    with pytest.raises(LineError, match=r"has no field id\.x"):
        read_keyed(line, "id.x")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"key": "secret"', "is not JSON"),
        (b'{"key": "secret"}', 'has no "value"'),
        (b'["secret"]', 'has no "value"'),
        (b'{"value": 1, "timestamp": "secret"}', '"timestamp"'),
        (b'{"value": 1, "headers": ["secret"]}', '"headers"'),
        (b'{"value": 1, "headers": [["a", {"$base64": "secret!"}]]}', "not base64"),
        (b'{"value": 1, "key": ["secret"]}', '"key"'),
        (b'{"value": {"$base64": 5}}', '"value"'),
    ],
)
def test_a_line_that_is_no_record_is_refused_without_repeating_it(line: bytes, reason: str) -> None:
    with pytest.raises(LineError) as caught:
        read_full(line)
    assert reason in str(caught.value)
    assert "secret" not in str(caught.value)
