"""Spans on their way out: what a collector that is away, slow or broken does to the processor. Nothing."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from streamproc.observe.span_export import SpanExport, endpoint_of, resource_of
from streamproc.observe.tracing import Tracing, _traced
from streamproc.records import Span, value_sizes
from streamproc.settings import TracingSettings
from tests.support.asyncs import until
from tests.support.spans import FakeRecord, lease


@pytest.fixture(autouse=True)
def _the_loggers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("opentelemetry", "urllib3")]
    levels = [logger.level for logger in loggers]
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


class Collector(SpanExporter):
    """Takes spans, or does not, as a test says."""

    def __init__(self, results: Sequence[SpanExportResult | Exception]) -> None:
        self.results = list(results)
        self.asked = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002 - the interface's
        self.asked += 1
        result = self.results.pop(0) if self.results else SpanExportResult.SUCCESS
        if isinstance(result, Exception):
            raise result
        return result


class Hanging(SpanExporter):
    """Waits until it is shut down, as OTLP's does between its attempts."""

    def __init__(self) -> None:
        self.entered, self.ended = threading.Event(), threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002 - the interface's
        self.entered.set()
        assert self.ended.wait(30)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.ended.set()


def make_span(tracing: Tracing) -> None:
    trace = tracing.request([])
    assert trace is not None
    tracing.answered(trace, "main", 200)


def test_a_collector_that_is_away_is_told_of_once_and_so_is_its_return(caplog: pytest.LogCaptureFixture) -> None:
    failure = SpanExportResult.FAILURE
    collector = Collector([failure, OSError("no route"), failure, SpanExportResult.SUCCESS])

    async def test() -> None:
        export = SpanExport(TracingSettings(sample_ratio=1.0), "app", {}, exporter=collector)
        for number in range(1, 6):
            make_span(export.tracing)
            await until(lambda: collector.asked >= number, "it was asked")  # noqa: B023 - called at once
        await export.close()

    with caplog.at_level(logging.INFO):
        asyncio.run(test())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert "spans do not reach the collector" in said[0]
    assert "takes spans again" in said[1]
    assert said[2].startswith("3 of 5 spans were lost")


def test_what_hangs_is_given_up_at_the_end_and_nobody_waits_for_a_queue_that_is_full(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    collector = Hanging()

    async def test() -> None:
        export = SpanExport(TracingSettings(sample_ratio=1.0), "app", {}, exporter=collector)
        for _ in range(100):
            make_span(export.tracing)
        await asyncio.to_thread(collector.entered.wait, 10)
        begun = time.monotonic()
        await export.close(timeout_s=0.05)
        assert time.monotonic() - begun < 10

    asyncio.run(test())
    assert "100 of 100 spans were lost" in caplog.text


def test_the_endpoint_is_the_settings_or_the_environments() -> None:
    def of(endpoint: str | None) -> str | None:
        return endpoint_of(TracingSettings(endpoint=endpoint))

    assert of(None) is None
    assert of("http://collector:4318") == of("http://collector:4318/") == "http://collector:4318/v1/traces"
    assert of("https://collector/otlp/v1/traces") == "https://collector/otlp/v1/traces"


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "http://user:word@collector", "http://a b"])
def test_an_endpoint_that_is_no_address_or_has_credentials_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        TracingSettings(endpoint=endpoint)


def test_the_services_name_is_the_settings_then_the_environments_then_the_applications(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def name(settings: TracingSettings, **environ: str) -> object:
        for key, value in environ.items():
            monkeypatch.setenv(key, value)
        return resource_of(settings, "app", environ).attributes["service.name"]

    assert name(TracingSettings()) == "app"
    assert name(TracingSettings(), OTEL_RESOURCE_ATTRIBUTES="service.name=ours,deployment=x") == "ours"
    assert name(TracingSettings(), OTEL_SERVICE_NAME="theirs") == "theirs"
    assert name(TracingSettings(service_name="mine"), OTEL_SERVICE_NAME="theirs") == "mine"


def tracing_of(ratio: float, seed: int) -> Tracing:
    return Tracing(
        SimpleSpanProcessor(InMemorySpanExporter()),
        Resource({}),
        version="1",
        sample_ratio=ratio,
        rng=random.Random(seed),
        wall_clock=lambda: 1_700_000_000.0,
    )


def arrive(tracing: Tracing, first: int, count: int) -> Span:
    records = [FakeRecord(offset=first + index) for index in range(count)]
    span = Span(lease(), first, records, value_sizes(records), 0.0)
    tracing.arrived(span)
    return span


@given(
    ratio=st.sampled_from([0.0, 0.01, 0.3, 1.0]), sizes=st.lists(st.integers(1, 300), min_size=1), seed=st.integers()
)
def test_which_records_are_chosen_does_not_depend_on_how_they_arrive(ratio: float, sizes: list[int], seed: int) -> None:
    """Only on the seed: polls of any size choose as one of all."""
    at_once, in_parts = tracing_of(ratio, seed), tracing_of(ratio, seed)
    whole = at_once._chosen(sum(sizes))
    chosen, first = [], 0
    for size in sizes:
        chosen += [first + index for index in in_parts._chosen(size)]
        first += size
    assert chosen == whole
    if ratio in (0.0, 1.0):
        assert len(whole) == ratio * sum(sizes)


def test_as_many_are_chosen_as_the_ratio_says() -> None:
    tracing = tracing_of(0.01, 1)
    chosen = sum(len(arrive(tracing, first, 100).traces or {}) for first in range(0, 100_000, 100))
    assert 900 < chosen < 1_100


@given(st.data())
def test_a_part_of_a_span_knows_its_own_traced_records_and_no_others(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    span = arrive(tracing_of(0.3, data.draw(st.integers())), 7, count)
    start = data.draw(st.integers(0, count - 1))
    part = span.part(start, data.draw(st.integers(start + 1, count)))
    traces = span.traces or {}
    expected = [(at - part.first, trace) for at, trace in sorted(traces.items()) if part.first <= at < part.stop]
    assert _traced(part) == expected


class _Otlp(BaseHTTPRequestHandler):
    """A collector that keeps what it gets."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        cast("OtlpServer", self.server).got.append((self.path, self.headers["api-key"], body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Nothing."""


class OtlpServer(ThreadingHTTPServer):
    got: list[tuple[str, str, bytes]]


def test_spans_reach_a_collector_by_otlp_with_the_headers_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=4711")

    async def test() -> None:
        server = OtlpServer(("127.0.0.1", 0), _Otlp)
        server.got = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        export = SpanExport(TracingSettings(endpoint=endpoint, sample_ratio=1.0), "app", {})
        make_span(export.tracing)
        await export.close()
        server.shutdown()
        server.server_close()
        ((path, key, body),) = server.got
        assert (path, key) == ("/v1/traces", "4711")
        (sent,) = ExportTraceServiceRequest.FromString(body).resource_spans
        assert ("service.name", "app") in [(it.key, it.value.string_value) for it in sent.resource.attributes]
        assert [span.name for span in sent.scope_spans[0].spans] == ["POST /tasks/{task}/predict"]

    asyncio.run(test())
