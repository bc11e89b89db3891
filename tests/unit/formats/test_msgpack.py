"""MessagePack is as strict as JSON: what is refused there for its shape is refused here."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import ormsgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.formats import msgpack
from streamproc.formats.values import FormatError
from streamproc.runtime import codec

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary()
)
RECORDS = st.dictionaries(
    st.text(),
    st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12),
    max_size=5,
)


@given(RECORDS, st.binary(min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_record_comes_back_and_one_that_is_cut_or_longer_is_refused(record: dict[str, Any], more: bytes) -> None:
    value = msgpack.encode(record)
    assert msgpack.decode(memoryview(value)) == record
    for bad in (value[:-1], value + more, value + value):
        with pytest.raises(FormatError):
            msgpack.decode(memoryview(bad))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b"", "InvalidMessagePack"),
        (b"\xc1", "InvalidMessagePack"),
        (b"\x92\x80\xc0", "NotAnObject"),
        (ormsgpack.packb([{}]), "NotAnObject"),
        (ormsgpack.packb(7), "NotAnObject"),
        (b"\x81\x01\x02", "InvalidMessagePack"),
        (b"\x81\xa1a\x81\x01\x02", "InvalidMessagePack"),
        (b"\x81\xa1\xff\x02", "InvalidMessagePack"),
        (b"\xdf\xff\xff\xff\xff", "InvalidMessagePack"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "InvalidMessagePack"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "InvalidMessagePack"),
        (b"\x81\xa1a" * 5_000, "InvalidMessagePack"),
        (b"\x81\xa1a\xd4\x05\0", "InvalidMessagePack"),
        (b"\x81\xa1a\xd7\xff" + b"\xff" * 8, "InvalidMessagePack"),
        (b"\x81\xa1a\xc7\x0c\xff" + b"\0" * 4 + b"\x7f" + b"\xff" * 7, "InvalidMessagePack"),
        (b"\x81\xa1a\x01\x00", "InvalidMessagePack"),
    ],
)
def test_what_is_no_record_is_refused(value: bytes, kind: str) -> None:
    with pytest.raises(FormatError) as raised:
        msgpack.decode(memoryview(value))
    assert raised.value.kind == kind


@pytest.mark.parametrize(
    ("extension", "text"),
    [
        (b"\xd6\xff\0\0\0\1", "1970-01-01T00:00:01Z"),
        (b"\xd7\xff" + (5 << 34 | 2).to_bytes(8, "big"), "1970-01-01T00:00:02.000000005Z"),
        (b"\xc7\x0c\xff\0\0\0\0" + (-1).to_bytes(8, "big", signed=True), "1969-12-31T23:59:59Z"),
    ],
)
def test_a_timestamp_is_text(extension: bytes, text: str) -> None:
    assert msgpack.decode(memoryview(b"\x81\xa1a" + extension)) == {"a": text}


def test_outputs_are_converted_as_in_json_and_bytes_stay_bytes() -> None:
    output = {"a": np.float32(0.5), "b": np.arange(3), "c": memoryview(b"xy"), "d": bytearray(b"z")}
    assert ormsgpack.unpackb(msgpack.encode(output)) == {"a": 0.5, "b": [0, 1, 2], "c": b"xy", "d": b"z"}
    with pytest.raises(TypeError):
        msgpack.encode({"a": object()})


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1), st.text(max_size=20), st.none() | st.text())
@settings(max_examples=50, deadline=None)
def test_the_envelope_says_what_that_of_json_does(offset: int, timestamp: int, topic: str, version: str | None) -> None:
    metrics = orjson.dumps({"batch_size": 1, "execution_times": {"execute": 1.5}, "queue_time": 0.1})
    place = ((topic, 3), [offset, 5], [timestamp, 7])
    ours = msgpack.Envelope("text", version).wrap([msgpack.encode({"x": 1}), msgpack.encode({})], metrics, *place)
    theirs = codec.Envelope("text", version).wrap([b'{"x":1}', b"{}"], metrics, *place)
    assert [msgpack.decode(memoryview(it)) for it in ours] == [orjson.loads(it) for it in theirs]
