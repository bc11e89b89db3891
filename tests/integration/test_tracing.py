"""Traces that go through a running processor, span by span: real workers, an exporter that keeps what it gets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.connections import KafkaConnections
from streamproc.broker.interface import NewTopic
from streamproc.broker.producer import KafkaProducer
from streamproc.broker.reader import KafkaReader
from streamproc.observe.http import create_app
from streamproc.observe.prediction import TaskInput
from streamproc.observe.span_export import SpanExport
from streamproc.observe.trace_context import read
from streamproc.observe.tracing import Tracing
from streamproc.records import TopicPartition
from streamproc.runtime.processor import Processor
from streamproc.runtime.startup import worker_setup
from streamproc.settings import KafkaSettings, Settings
from streamproc.testing import MemoryBroker, MemoryRecord
from tests.conftest import TopicName
from tests.support.asyncs import until

ROOT = Path(__file__).parents[2]
STEPS = ["decode", "preprocess", "transform_inputs", "execute", "transform_outputs", "encode"]
PRODUCER_SPAN = 0xA1
TRACE = 0x4BF92F3577B34DA6A3CE929D0E0E4736
MARK = "marked-4711"


def parent(number: int, *, sampled: bool = True) -> tuple[str, bytes]:
    """The header of a producer whose trace, and span, have this number."""
    return ("traceparent", f"00-{TRACE + number:032x}-{PRODUCER_SPAN + number:016x}-0{int(sampled)}".encode())


class Spans:
    """What was exported."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self.exporter = exporter

    @property
    def all(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all if span.name == name]

    def one(self, name: str, trace_id: int | None = None) -> ReadableSpan:
        (span,) = [it for it in self.named(name) if trace_id in (None, context(it).trace_id)]
        return span

    def children(self, span: ReadableSpan) -> list[ReadableSpan]:
        found = [it for it in self.all if it.parent is not None and it.parent.span_id == context(span).span_id]
        return sorted(found, key=lambda it: it.start_time or 0)


def context(span: ReadableSpan) -> SpanContext:
    found = span.get_span_context()
    assert isinstance(found, SpanContext)
    return found


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def linked(span: ReadableSpan) -> set[int]:
    return {link.context.span_id for link in span.links}


def settings_for(**options: Any) -> Settings:
    task = {"batch": {"max_size": 8, "max_wait_ms": 20}, "commit_interval_ms": 20, **options.pop("task", {})}
    return Settings.model_validate(
        {
            "name": "app",
            "backend": {
                "path": f"tests.support.{options.pop('backend', 'backends:Scripted')}",
                "base_dir": str(ROOT),
                "version": "7",
            },
            "pool": {"restart_backoff_ms": 5},
            "tasks": {"main": {"input": {"topics": ["in"]}, **task}},
            **options,
        }
    )


@contextlib.asynccontextmanager
async def processing(*, ratio: float = 0.0, **options: Any) -> AsyncIterator[tuple[MemoryBroker, Spans, Processor]]:
    """A processor over the in-memory broker."""
    settings = settings_for(**options)
    broker = MemoryBroker()
    for name in ("in", "in.results", "in.dead", "app.metrics"):
        broker.create_topic(name)
    exporter = InMemorySpanExporter()
    tracing = Tracing(
        SimpleSpanProcessor(exporter),
        Resource({}),
        version="1",
        sample_ratio=ratio,
        rng=random.Random(1),
        wall_clock=time.time,
    )
    processor = Processor(settings, worker_setup(settings, {}), broker, rng=random.Random(1), tracing=tracing)
    try:
        await processor.start()
        yield broker, Spans(exporter), processor
    finally:
        await processor.stop()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def put(broker: MemoryBroker, records: Sequence[dict[str, Any]], *headers: Sequence[tuple[str, bytes]]) -> None:
    for index, record in enumerate(records):
        broker.append("in", json.dumps(record).encode(), headers=headers[index] if index < len(headers) else ())


async def committed(broker: MemoryBroker, count: int) -> None:
    await until(lambda: sum(broker.committed("app.main").values()) == count, f"{count} are committed")


def writer_of(record: MemoryRecord) -> int:
    """The span that a record was written by."""
    told = read(record.headers)
    assert told is not None
    return told.span_id


@pytest.mark.embedded
def test_a_trace_goes_from_a_producer_through_the_processor_to_a_consumer(
    embedded_broker: str, topic_name: TopicName
) -> None:
    """Each end as OpenTelemetry's own propagator has it."""
    propagator = TraceContextTextMapPropagator()
    exporter = InMemorySpanExporter()
    ends = TracerProvider(shutdown_on_exit=False)
    ends.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = ends.get_tracer("ends")
    source = topic_name("traced")
    kafka = KafkaSettings(bootstrap_servers=embedded_broker)
    settings = settings_for(
        backend="spanning_backend:Spanning",
        kafka=kafka.model_dump(),
        name=topic_name("app"),
        task={"input": {"topics": [source]}},
    )
    topics = settings.topics_of("main")

    async def produce() -> None:
        producer = KafkaProducer(kafka, client_id="test", max_batch_bytes=900_000)
        await producer.start()
        batch = producer.create_batch()
        for number in range(2):
            carrier: dict[str, str] = {}
            with tracer.start_as_current_span(f"send {number}", kind=SpanKind.PRODUCER):
                propagator.inject(carrier)
            headers = [("other", b"kept"), *((name, value.encode()) for name, value in carrier.items())]
            assert batch.append(timestamp=None, key=b"k", value=b'{"id":%d}' % number, headers=headers) is not None
        await (await producer.send_batch(batch, source, 0))
        await producer.stop()

    async def consume() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        async with KafkaReader(kafka) as reader:
            reader.assign({TopicPartition(topics.results, 0): 0})
            while len(found) < 2:
                for some in (await reader.getmany(timeout_ms=200)).values():
                    for record in some:
                        carrier = {name: (value or b"").decode() for name, value in record.headers}
                        assert carrier["other"] == "kept"
                        result = json.loads(record.value or b"")["result"]
                        with tracer.start_as_current_span(
                            f"receive {result['id']}", propagator.extract(carrier), kind=SpanKind.CONSUMER
                        ):
                            found.append(result)
        return found

    async def test() -> None:
        async with KafkaAdmin(kafka) as admin:
            names = [source, topics.results, topics.dead, topics.metrics]
            await admin.create_topics([NewTopic(name, 1, 1, {}) for name in names])
        export = SpanExport(settings.tracing, settings.name, {}, exporter=exporter)
        connections = KafkaConnections(settings.kafka)
        processor = Processor(settings, worker_setup(settings, {}), connections, tracing=export.tracing)
        try:
            await processor.start()
            await produce()
            async with asyncio.timeout(30):
                results = await consume()
            (worker,) = [it.pid for it in processor.pool.workers()]
        finally:
            await processor.stop()
        await export.close()
        spans = Spans(exporter)
        for number in range(2):
            sent = spans.one(f"send {number}")
            trace_id = context(sent).trace_id
            processed = spans.one(f"process {source}", trace_id)
            published = spans.one(f"publish {topics.results}", trace_id)
            received = spans.one(f"receive {number}", trace_id)
            assert [it.name for it in spans.children(sent)] == [processed.name]
            assert [it.name for it in spans.children(processed)] == [published.name]
            assert [it.name for it in spans.children(published)] == [received.name]
            assert processed.parent is not None
            assert processed.parent.is_remote
            assert (processed.kind, published.kind) == (SpanKind.CONSUMER, SpanKind.PRODUCER)
            assert processed.status.status_code is published.status.status_code is StatusCode.UNSET
            assert attributes(processed) == {
                "messaging.system": "kafka",
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": source,
                "messaging.destination.partition.id": "0",
                "messaging.kafka.offset": number,
                "messaging.message.body.size": 8,
                "messaging.consumer.group.name": settings.group_of("main"),
                "streamproc.task": "main",
                "streamproc.executions": 1,
            }
            assert attributes(published) == {
                "messaging.system": "kafka",
                "messaging.operation.name": "publish",
                "messaging.operation.type": "send",
                "messaging.destination.name": topics.results,
                "streamproc.task": "main",
            }
            executed = next(it for it in spans.named("execute main") if context(it).span_id in linked(processed))
            assert context(processed).span_id in linked(executed)
            assert executed.parent is None
            assert executed.kind is SpanKind.INTERNAL
            told = attributes(executed)
            assert told["streamproc.worker.index"] == 0
            assert told["process.pid"] == worker
            assert told["messaging.batch.message_count"] == len(linked(executed))
            times = [processed.start_time, executed.start_time, executed.end_time, published.end_time]
            assert None not in times
            assert times == sorted(times, key=lambda it: it or 0)
            assert published.end_time == processed.end_time
            (result,) = [it for it in results if it["id"] == number]
            assert result["trace"] == f"{context(executed).trace_id:032x}", "the backend's own span is of its trace"
            assert result["parent"] == f"{context(executed).span_id:016x}"
        assert len([it for it in spans.all if it.name.startswith(("process", "publish", "send", "receive"))]) == 8
        (name,) = {it.resource.attributes["service.name"] for it in spans.named(f"process {source}")}
        assert name == settings.name

    run(test)


def test_a_batch_has_one_span_that_says_what_is_known_of_it_and_its_steps_are_its_children() -> None:
    async def test() -> None:
        async with processing(task={"batch": {"max_size": 4, "max_wait_ms": 10_000}}) as (broker, spans, _):
            records: list[dict[str, Any]] = [{"id": 0}, {"id": 1, "do": "refuse", "why": MARK}, {"id": 2}, {"id": 3}]
            put(broker, records, [parent(0)], [parent(1)])
            await committed(broker, 4)
            executed = spans.one("execute main")
            told = attributes(executed)
            assert told.pop("streamproc.batch.wall_ms") > 0
            assert told.pop("process.pid") > 0
            assert told == {
                "streamproc.task": "main",
                "messaging.batch.message_count": 4,
                "streamproc.batch.id": 1,
                "streamproc.batch.attempt": 1,
                "streamproc.batch.closed_by": "size",
                "streamproc.batch.fill": 1.0,
                "streamproc.worker.index": 0,
                "streamproc.batch.results": 3,
                "streamproc.batch.failed": 1,
            }
            processed = spans.named("process in")
            assert linked(executed) == {context(it).span_id for it in processed}
            assert [context(it).trace_id for it in processed] == [TRACE, TRACE + 1], "and of no record without a trace"
            assert context(executed).trace_id not in (TRACE, TRACE + 1)
            steps = spans.children(executed)
            assert [it.name for it in steps] == [it for it in STEPS if it in {step.name for step in steps}]
            assert {"decode", "execute", "encode"} <= {it.name for it in steps}
            edges = [executed.start_time, *(time for it in steps for time in (it.start_time, it.end_time))]
            assert [*edges, executed.end_time] == sorted([*edges, executed.end_time], key=lambda it: it or 0)

    run(test)


def test_a_dead_letter_goes_on_with_the_trace_and_its_span_says_why() -> None:
    async def test() -> None:
        async with processing() as (broker, spans, _):
            records: list[dict[str, Any]] = [{"id": 0, "do": "refuse", "why": MARK}, {"id": 1}, {"id": 2}]
            put(broker, records, [parent(0), ("tracestate", b"a=1")], [parent(1)])
            await committed(broker, 3)
            (dead,) = broker.records("in.dead")
            processed, published = spans.one("process in", TRACE), spans.one("publish in.dead")
            assert read(dead.headers) == (TRACE, context(published).span_id, 1, "a=1")
            assert [it.name for it in spans.children(processed)] == ["publish in.dead"]
            assert processed.status.status_code is StatusCode.ERROR
            assert processed.status.description == "execute failed with RecordError"
            for span in (processed, published):
                told = attributes(span)
                assert told["error.type"] == "RecordError"
                assert (told["streamproc.cause"], told["streamproc.stage"]) == ("rejected", "execute")
            assert context(processed).trace_state.to_header() == "a=1"
            assert spans.one("process in", TRACE + 1).status.status_code is StatusCode.UNSET
            assert not any(MARK in span.to_json() for span in spans.all)

    run(test)


def test_a_batch_that_is_retried_and_split_has_a_span_for_each_execution() -> None:
    """Of four records one raises: all four again, since one retry is allowed, and then one by one."""

    async def test() -> None:
        task = {"batch": {"max_size": 4, "max_wait_ms": 10_000}, "on_error": {"retries": 1, "backoff_ms": 1}}
        async with processing(task=task) as (broker, spans, _):
            records: list[dict[str, Any]] = [
                {"id": 0},
                {"id": 1, "do": "nest", "depth": 1, "why": MARK},
                {"id": 2},
                {"id": 3},
            ]
            put(broker, records, *([parent(number)] for number in range(4)))
            await committed(broker, 4)
            executions = sorted(spans.named("execute main"), key=lambda it: attributes(it)["streamproc.batch.id"])
            told = [attributes(it) for it in executions]
            assert [it["streamproc.batch.attempt"] for it in told] == [1, 2, 3, 3, 3, 3]
            assert [it["messaging.batch.message_count"] for it in told] == [4, 4, 1, 1, 1, 1]
            assert [it["streamproc.batch.closed_by"] for it in told] == ["size", "size", *["split"] * 4]
            failed = [it for it in executions if it.status.status_code is StatusCode.ERROR]
            assert [executions.index(it) for it in failed] == [0, 1, 3]
            for it in failed:
                assert it.status.description == "execute failed with ValueError"
                assert attributes(it)["streamproc.cause"] == "exception"
                assert spans.children(it) == []
            for number in range(4):
                processed = spans.one("process in", TRACE + number)
                mine = [executions[0], executions[1], executions[2 + number]]
                assert linked(processed) == {context(it).span_id for it in mine}
                assert attributes(processed)["streamproc.executions"] == 3
                assert (processed.status.status_code is StatusCode.ERROR) == (number == 1)
                assert [context(processed).span_id in linked(it) for it in executions] == [
                    it in mine for it in executions
                ]
            assert not any(MARK in span.to_json() for span in spans.all)

    run(test)


def test_records_without_a_sampled_parent_leave_no_span_and_their_headers_as_they_are() -> None:
    async def test() -> None:
        async with processing() as (broker, spans, _):
            headers = [
                [],
                [parent(1, sampled=False), ("tracestate", b"a=1")],
                [("traceparent", b"00-nonsense")],
                [parent(3), parent(4)],
                [("traceparent", b"")],
            ]
            put(broker, [{"id": number} for number in range(len(headers))], *headers)
            await committed(broker, len(headers))
            assert [list(record.headers) for record in broker.records("in.results")] == headers
            assert spans.all == ()

    run(test)


def test_a_share_of_the_records_without_a_parent_begins_traces_whose_parent_is_nobody() -> None:
    async def test() -> None:
        async with processing(ratio=1.0) as (broker, spans, _):
            put(broker, [{"id": 0}, {"id": 1}], [("traceparent", b"malformed")], [parent(1, sampled=False)])
            await committed(broker, 2)
            processed, published = spans.one("process in"), spans.one("publish in.results")
            assert processed.parent is None
            first, second = broker.records("in.results")
            assert [name for name, _ in first.headers] == ["traceparent"], "in the place of what was none"
            assert writer_of(first) == context(published).span_id
            assert list(second.headers) == [parent(1, sampled=False)], "a parent that is not sampled decides"

    run(test)


@pytest.mark.parametrize(
    "options", [{"ordering": "key"}, {"delivery": "exactly_once"}, {"output": {"envelope": "result"}}]
)
def test_every_record_has_its_own_trace_whatever_order_and_delivery_the_task_has(options: dict[str, Any]) -> None:
    async def test() -> None:
        async with processing(task=options) as (broker, spans, _):
            for number in range(40):
                value = json.dumps({"id": number}).encode()
                headers = [parent(number)] if number % 3 else []
                broker.append("in", value, key=b"k%d" % (number % 4), headers=headers)
            await committed(broker, 40)
            for number, record in enumerate(sorted(broker.records("in.results"), key=numbered)):
                if not number % 3:
                    assert read(record.headers) is None
                    continue
                processed = spans.one("process in", TRACE + number)
                (published,) = spans.children(processed)
                assert read(record.headers) == (TRACE + number, context(published).span_id, 1, "")
                assert attributes(processed)["messaging.kafka.offset"] == number
            assert len(spans.named("process in")) == len([it for it in range(40) if it % 3])

    run(test)


def numbered(record: MemoryRecord) -> int:
    told = json.loads(record.value or b"")
    return int(told.get("result", told)["id"])


def test_a_result_that_is_too_large_is_a_dead_letter_of_its_trace() -> None:
    async def test() -> None:
        async with processing(backend="backends:Growing") as (broker, spans, _):
            put(broker, [{"id": 0, "bytes": 1_200_000}], [parent(0)])
            await committed(broker, 1)
            (dead,) = broker.records("in.dead")
            published = spans.one("publish in.dead")
            assert writer_of(dead) == context(published).span_id
            assert attributes(spans.one("process in"))["streamproc.cause"] == "too_large"
            assert spans.named("publish in.results") == []

    run(test)


def test_what_is_dropped_has_a_span_and_nothing_is_published() -> None:
    async def test() -> None:
        async with processing(task={"on_error": {"then": "drop"}}) as (broker, spans, _):
            put(broker, [{"id": 0, "do": "refuse"}], [parent(0)])
            await committed(broker, 1)
            processed = spans.one("process in")
            assert processed.status.status_code is StatusCode.ERROR
            assert spans.children(processed) == []

    run(test)


def test_a_request_over_http_continues_its_trace_and_says_so() -> None:
    async def test() -> None:
        async with processing() as (_, spans, processor):
            tracing = Tracing(
                SimpleSpanProcessor(spans.exporter),
                Resource({}),
                version="1",
                sample_ratio=0.0,
                rng=random.Random(2),
                wall_clock=time.time,
            )
            inputs = {"main": TaskInput()}
            app = create_app(
                processor, processor.metrics, processor.settings.http, inputs=lambda: inputs, tracing=tracing
            )
            await until(lambda: processor.ready().ok, "it takes requests")
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:

                async def post(body: Any, *headers: tuple[str, bytes]) -> httpx.Response:
                    given = {name: value.decode() for name, value in headers}
                    return await client.post("/tasks/main/predict", json=body, headers=given)

                answer = await post([{"id": 0}, {"id": 1}], parent(0))
                failed = await post({"id": 2, "do": "raise"}, parent(2))
                unsampled = await post({"id": 3}, parent(3, sampled=False))
                without = await post({"id": 4}, ("traceparent", b"nonsense"))
            assert [it.status_code for it in (answer, failed, unsampled, without)] == [200, 500, 200, 200]
            served = spans.one("POST /tasks/{task}/predict", TRACE)
            assert answer.headers["traceparent"] == f"00-{TRACE:032x}-{context(served).span_id:016x}-01"
            assert unsampled.headers["traceparent"] == parent(3, sampled=False)[1].decode()
            assert "traceparent" not in without.headers
            assert served.kind is SpanKind.SERVER
            assert served.parent is not None
            assert served.parent.span_id == PRODUCER_SPAN
            assert attributes(served) == {
                "http.request.method": "POST",
                "http.route": "/tasks/{task}/predict",
                "url.path": "/tasks/main/predict",
                "url.scheme": "http",
                "http.response.status_code": 200,
                "streamproc.task": "main",
            }
            executed = next(it for it in spans.named("execute main") if context(it).span_id in linked(served))
            assert [link.context.span_id for link in executed.links] == [context(served).span_id], (
                "once for two records"
            )
            broken = spans.one("POST /tasks/{task}/predict", TRACE + 2)
            assert broken.status.status_code is StatusCode.ERROR
            assert attributes(broken)["error.type"] == "500"
            assert len(spans.named("POST /tasks/{task}/predict")) == 2

    run(test)
