"""What a backend may answer where results are not JSON."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from streamproc.formats.values import samples_in
from streamproc.runtime.codec import Schema, decode
from streamproc.runtime.decoders import decode_one_for, decoder_for
from streamproc.runtime.encoders import encode_raw, encode_without_schema, encoder_for


@pytest.mark.parametrize(
    ("value", "expected"), [(b"\xff", b"\xff"), (bytearray(b"a"), b"a"), (memoryview(b"b"), b"b"), ("é", "é".encode())]
)
def test_a_raw_result_is_the_bytes_of_its_one_field(value: Any, expected: bytes) -> None:
    encoded = encode_raw({"value": value})
    assert (type(encoded), encoded) == (bytes, expected)


@pytest.mark.parametrize("output", [{}, {"value": 5}, {"value": None}, {"value": b"", "more": 1}, {"other": b""}])
def test_what_is_no_raw_result_is_refused_and_nothing_of_it_is_dropped(output: Any) -> None:
    with pytest.raises(TypeError, match="a raw result is"):
        encode_raw(output)
    assert encoder_for({"format": "raw"}, None).encode_all([{"value": b"x"}, output]) is None


def test_a_raw_value_is_not_copied_on_its_way_out() -> None:
    value = bytes(1_000)
    assert encode_raw({"value": value}) is value


def test_a_raw_record_is_a_copy_since_the_memory_of_a_batch_is_that_of_the_next() -> None:
    memory = bytearray(b"abc")
    record = decode_one_for("raw")(memoryview(memory))
    memory[:] = b"xyz"
    assert record == {"value": b"abc"}


def test_json_is_decoded_by_the_codec_itself() -> None:
    value = memoryview(b'{"a": 123456789012345678901}')
    assert decoder_for("json", 100)([value], value) == decode([value], value, 100)


def test_a_schema_sees_bytes_as_base64() -> None:
    schema = Schema("in", {"properties": {"a": {"type": "string", "maxLength": 4}}})
    assert schema.check({"a": b"abc"}) is None
    failure = schema.check({"a": b"abcd", "b": [b""]})
    assert failure is not None
    assert failure.kind == "SchemaViolation"


def test_samples_stand_for_bytes_where_the_format_has_them() -> None:
    sample = {"value": {"$base64": "/wA="}, "more": [{"$base64": 5}]}
    assert samples_in("json", [sample]) == [sample]
    assert samples_in("raw", [sample]) == [{"value": b"\xff\0", "more": [{"$base64": 5}]}]
    with pytest.raises(ValueError, match="not base64"):
        samples_in("raw", [{"value": {"$base64": "?"}}])


@pytest.mark.parametrize("output_format", ["avro", "protobuf", "json_schema"])
def test_without_a_registry_outputs_are_judged_by_what_they_hold(output_format: str) -> None:
    encode = encode_without_schema(output_format)
    assert encode is not None
    assert orjson.loads(encode({"a": b"x"})) == {"a": "eA=="}
    with pytest.raises(TypeError):
        encode({"a": object()})


@pytest.mark.parametrize("output_format", ["avro", "protobuf", "json_schema"])
def test_formats_with_schemas_cannot_do_without_a_registry(output_format: str) -> None:
    with pytest.raises(ValueError, match="needs a schema registry"):
        encoder_for({"format": output_format}, None)
    with pytest.raises(ValueError, match="needs a schema registry"):
        decoder_for(output_format, 10)
