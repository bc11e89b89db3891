"""Decoding is strict, one record at a time; encoding is lenient about types and strict about JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.records import Cause, Failure
from streamproc.runtime.codec import Envelope, Schema, _has_long_digit_run, decode, encode
from streamproc.runtime.failures import decode_failure, encode_failure

MAX_VALUE_BYTES = 1_000_000
GOOD = b'{"id": 1}'


def run(*values: bytes | None) -> list[dict[str, Any] | Failure]:
    payload = b"".join(value or b"" for value in values)
    return decode(
        [None if value is None else memoryview(value) for value in values], memoryview(payload), MAX_VALUE_BYTES
    )


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "NullValue"),
        (b"", "InvalidJSON"),
        (b'{"id": 1', "InvalidJSON"),
        (b'{"id": NaN}', "InvalidJSON"),
        (b'{"id": Infinity}', "InvalidJSON"),
        (b'{"id": "\xff\xfe"}', "InvalidJSON"),
        (b'{"id": "\xed\xa0\x80"}', "InvalidJSON"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "InvalidJSON"),
        (b"[1, 2]", "NotAnObject"),
        (b"null", "NotAnObject"),
        (b"17", "NotAnObject"),
        (b'{"id": 18446744073709551616}', "IntegerTooLarge"),
        (b'{"id": -9223372036854775809}', "IntegerTooLarge"),
        (b'{"id": [1, {"x": 123456789012345678901234567890}]}', "IntegerTooLarge"),
        (b'{"id": ' + b"9" * 5_000 + b"}", "InvalidJSON"),
        (b'{"id": 1},{"id": 2}', "InvalidJSON"),
        (b'{"id": "' + b"x" * MAX_VALUE_BYTES + b'"}', "ValueTooLarge"),
    ],
)
def test_a_bad_value_fails_alone_with_its_own_reason(value: bytes | None, kind: str) -> None:
    first, bad, last = run(GOOD, value, GOOD)
    assert (first, last) == ({"id": 1}, {"id": 1})
    assert isinstance(bad, Failure)
    assert (bad.cause, bad.stage, bad.kind) == (Cause.INVALID, "decode", kind)


@pytest.mark.parametrize(
    "value",
    [
        b'{"id": 18446744073709551615}',
        b'{"id": -9223372036854775808}',
        b'{"id": "123456789012345678901234567890"}',
        b'{"id": 0.1234567890123456789012345678901234567890}',
        b'{"id": 12345678901234567890.5}',
        b'{"id": 1e300}',
    ],
)
def test_long_digits_that_lose_nothing_pass(value: bytes) -> None:
    assert run(value, GOOD) == [json.loads(value), {"id": 1}]


@given(st.lists(st.integers(-(10**25), 10**25), min_size=1, max_size=8), st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_no_integer_ever_changes_silently(integers: list[int], padding: int) -> None:
    values = [json.dumps({"p": "x" * padding, "n": integer}).encode() for integer in integers]
    for integer, record in zip(integers, run(*values), strict=True):
        if -(2**63) <= integer < 2**64:
            assert record == {"p": "x" * padding, "n": integer}
        else:
            assert isinstance(record, Failure)
            assert record.kind == "IntegerTooLarge"


@given(st.lists(st.text("0123456789", max_size=24) | st.text("ab/:", max_size=12), max_size=12).map("".join))
@settings(max_examples=500, deadline=None)
def test_nineteen_digits_in_a_row_are_seen_wherever_they_stand_and_no_fewer(text: str) -> None:
    longest = max(map(len, re.findall("[0-9]+", text)), default=0)
    assert _has_long_digit_run(memoryview(text.encode())) is (longest >= 19)


def test_a_schema_violation_names_the_field_and_the_rule_and_not_the_data() -> None:
    schema = Schema("in", {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]})
    assert schema.check({"id": 1}) is None
    failure = schema.check({"id": "s3cret"})
    assert failure is not None
    assert failure.message == 'id: its value is not of type "integer" (schema of topic in, at properties/id/type)'
    missing = schema.check({})
    assert missing is not None
    assert "required" in missing.message


def test_arrays_and_odd_keys_are_encoded() -> None:
    output = {"a": np.arange(3), "b": np.float32(1.5), 3: "three", "s": {1, 2}, "nan": float("nan")}
    assert json.loads(encode(output)) == {"a": [0, 1, 2], "b": 1.5, "3": "three", "s": [1, 2], "nan": None}


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError):
        encode({"f": object()})
    with pytest.raises(TypeError):
        encode({"n": 2**70})


def test_a_failure_makes_the_round_trip() -> None:
    failure = Failure(Cause.INVALID, "schema", "SchemaViolation", "no — “quoted”")
    assert decode_failure(encode_failure(failure)) == failure


numbers = st.tuples(st.integers(0, 2**62), st.integers(-(2**40), 2**60))


@given(st.text(), st.none() | st.text(), st.text(), st.integers(0, 999), st.lists(numbers, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_the_envelope_is_what_the_design_says(
    task: str, version: str | None, topic: str, partition: int, where: list[tuple[int, int]]
) -> None:
    envelope = Envelope(task, version)
    results = [encode({"y": index}) for index in range(len(where))]
    offsets, timestamps = [offset for offset, _ in where], [timestamp for _, timestamp in where]
    for _ in range(2):
        wrapped = envelope.wrap(results, b'{"batch_size":1}', (topic, partition), offsets, timestamps)
        assert [json.loads(value) for value in wrapped] == [
            {
                "result": {"y": index},
                "metrics": {"batch_size": 1},
                "source": {"topic": topic, "partition": partition, "offset": offset, "timestamp": timestamp},
                "task": task,
                **({} if version is None else {"backend_version": version}),
            }
            for index, (offset, timestamp) in enumerate(where)
        ]
