"""What records of output topics say, as the processor writes them: the full envelope, headers, dead letters."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from streamproc.broker.interface import Headers, Row
from streamproc.broker.memory_log import MemoryRecord
from streamproc.formats import msgpack
from streamproc.records import Batch, BatchReport, Cause, Failure, TopicPartition
from streamproc.replay.marks import Source, mark
from streamproc.replay.results import read
from streamproc.runtime.codec import Envelope
from streamproc.runtime.envelopes import dead_letter_row, result_rows

METRICS = b'{"batch_size":4,"execution_times":{"preprocess":0.1,"execute":2.0},"total_execution_time":2.1}'
REPORT = BatchReport(Batch(7, "text", (), 0.0, 1.0, "size", 1.0), 0, METRICS, attempts=1)
PARTITION = TopicPartition("texts", 3)
INPUT = MemoryRecord("texts", 3, 41, 1_000, b"k", b'{"text":"fine"}', (("trace", b"7"),))


def result_of(record: MemoryRecord, value: bytes) -> Row:
    (row,) = result_rows(PARTITION, [record], [value], REPORT)
    return row


def written(row: Any, topic: str = "texts.results") -> MemoryRecord:
    timestamp, key, value, headers = row
    return MemoryRecord(topic, 0, 5, timestamp or 1_250, key, bytes(value), tuple(headers))


def enveloped(headers: Headers = (), result: Any = None, source: MemoryRecord = INPUT) -> MemoryRecord:
    envelope = Envelope("text")
    encoded = orjson.dumps({"label": "good"} if result is None else result)
    (value,) = envelope.wrap([encoded], METRICS, (source.topic, source.partition), [source.offset], [source.timestamp])
    return written((None, b"k", value, list(headers)))


def failed(record: MemoryRecord = INPUT, cause: Cause = Cause.EXCEPTION) -> MemoryRecord:
    partition = TopicPartition(record.topic, record.partition)
    row = dead_letter_row(partition, record, Failure(cause, "execute", "ValueError", "no"), REPORT, 1_000_000)
    return written(row, "texts.dead")


@pytest.mark.parametrize("record", [enveloped(), written(result_of(INPUT, b'{"label":"good"}'))])
def test_a_result_tells_its_source_its_output_and_its_batch_in_either_envelope(record: MemoryRecord) -> None:
    found = read(record)
    assert found is not None
    assert (found.task, found.source, found.key) == ("text", Source("texts", 3, 41), b"k")
    assert (found.value, found.cause, found.latency_ms) == ({"label": "good"}, None, 250)
    assert found.metrics is not None
    assert found.metrics["batch_size"] == 4


def test_an_envelope_with_the_backends_version_tells_the_same() -> None:
    (value,) = Envelope("text", "2024-05").wrap([b'{"label":"good"}'], METRICS, ("texts", 3), [41], [1_000])
    assert orjson.loads(value)["backend_version"] == "2024-05"
    assert read(written((None, b"k", value, []))) == read(enveloped())


def test_an_envelope_in_messagepack_tells_the_same_with_bytes_as_base64() -> None:
    envelope, result = msgpack.Envelope("text"), msgpack.encode({"label": "good", "data": b"\xff"})
    (value,) = envelope.wrap([result], METRICS, ("texts", 3), [41], [1_000])
    found, told = read(written((None, b"k", value, []))), read(enveloped())
    assert found is not None
    assert told is not None
    assert found.value == {"label": "good", "data": "/w=="}
    assert (found.source, found.metrics, found.latency_ms) == (told.source, told.metrics, told.latency_ms)


def test_the_source_of_a_replayed_record_is_the_one_that_was_captured() -> None:
    captured = Source("production", 0, 9)
    headers = mark(INPUT.headers, "run", captured)
    replayed = MemoryRecord("texts", 0, 0, 1_000, b"k", INPUT.value, tuple(headers))
    for record in (
        enveloped(headers),
        written(result_of(replayed, b"{}")),
        failed(replayed),
    ):
        found = read(record)
        assert found is not None
        assert found.source == captured


def test_a_result_with_nothing_beside_it_tells_its_source_where_it_is_a_replays_and_no_task() -> None:
    headers = mark((), "run", Source("production", 0, 9))
    found = read(written((None, b"k", b'{"label":"good"}', headers)))
    assert found is not None
    assert (found.source, found.task, found.value) == (Source("production", 0, 9), "", {"label": "good"})
    assert read(written((None, b"k", b'{"label":"good"}', []))) is None


def test_a_dead_letter_tells_its_cause_whatever_its_value_is() -> None:
    chained = MemoryRecord("texts", 3, 41, 1_000, b"k", enveloped().value)
    for record in (failed(), failed(chained)):
        found = read(record)
        assert found is not None
        assert (found.source, found.task, found.cause) == (Source("texts", 3, 41), "text", "exception")
        assert found.value == {"cause": "exception", "stage": "execute", "error": "ValueError", "message": "no"}


def test_a_result_of_a_record_that_was_a_dead_letter_before_is_a_result() -> None:
    again = MemoryRecord("texts", 3, 50, 1_000, b"k", INPUT.value, failed().headers)
    found = read(written(result_of(again, b"{}")))
    assert found is not None
    assert (found.cause, found.source) == (None, Source("texts", 3, 50))


def test_a_dead_letter_of_a_record_that_was_a_result_before_is_a_dead_letter() -> None:
    chained = MemoryRecord("next", 0, 2, 1_000, b"k", b"{}", written(result_of(INPUT, b"{}")).headers)
    found = read(failed(chained))
    assert found is not None
    assert (found.cause, found.source) == ("exception", Source("next", 0, 2))


def test_a_record_without_a_source_is_nobodys_result() -> None:
    for value in (b'{"a":1}', b"no JSON", None, b"\xff", b'{"result":1,"metrics":{},"source":{},"task":"t"}'):
        assert read(MemoryRecord("t", 0, 0, 1, None, value, (("streamproc-source-topic", b"t"),))) is None


def test_a_value_that_is_no_json_is_kept_byte_for_byte() -> None:
    values = []
    for value in (b"plain", b"\xff\xfe"):
        found = read(MemoryRecord("t", 0, 0, 1, None, value, tuple(result_of(INPUT, b"")[3])))
        assert found is not None
        values.append(found.value)
    assert values == [{"$text": "plain"}, {"$base64": "//4="}]
