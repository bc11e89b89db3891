"""Where spans go: by OTLP over HTTP to a collector, from a bounded queue, in a thread of the SDK's own.

A collector that is away stops nothing: spans that find no room in the queue, or do not get through, are lost, and the
log says so once until it is back. What OpenTelemetry's environment variables say (OTEL_EXPORTER_OTLP_*, OTEL_BSP_*,
OTEL_RESOURCE_ATTRIBUTES, OTEL_SERVICE_NAME, OTEL_SDK_DISABLED) counts where the settings say nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from streamproc.observe.metrics import package_version
from streamproc.observe.tracing import Tracing
from streamproc.settings import TracingSettings

CLOSE_TIMEOUT_S = 5.0
"""How long a collector may take at the end to get what is queued."""
LAST_GRACE_S = 0.5
TRACES_PATH = "/v1/traces"

log = logging.getLogger(__name__)


class SpanExport:
    """A processor's traces, and their way out. ``close`` has to be called at last, in the loop that it was made in.

    Args:
        settings: Where to, and how much.
        name: The application's, which is the service's by default.
        environ: Only looked at for the service's name; the SDK reads the rest of it by itself.
        exporter: In place of OTLP's.
        rng: Chooses the records that begin a trace.
    """

    def __init__(
        self,
        settings: TracingSettings,
        name: str,
        environ: Mapping[str, str],
        *,
        exporter: SpanExporter | None = None,
        rng: random.Random | None = None,
    ) -> None:
        # Each says on its own what ``_Told`` says once, at every attempt.
        for library in ("opentelemetry", "urllib3"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        self._exporter = _Told(exporter or OTLPSpanExporter(endpoint=endpoint_of(settings)))
        self._processor = BatchSpanProcessor(self._exporter)
        self.tracing = Tracing(
            self._processor,
            resource_of(settings, name, environ),
            version=package_version(),
            sample_ratio=settings.sample_ratio,
            rng=rng or random.Random(),  # noqa: S311 - ids and samples, no secret
            wall_clock=time.time,
        )

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Hand over what is queued; what takes longer is lost. One that is away is not waited for."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(done.set)

        # A thread that nobody waits for: those of the loop's own pool would hold up its end.
        threading.Thread(target=shut_down, name="tracing: last spans", daemon=True).start()
        for wait_s in (LAST_GRACE_S if self._exporter.failing else timeout_s, LAST_GRACE_S):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await done.wait()
                    break
            self._exporter.shutdown()  # ends the pauses between its attempts
        if lost := self.tracing.emitted - self._exporter.exported:
            log.warning(
                "%d of %d spans were lost: the collector did not take them, or there was no room for more in the queue "
                "(OTEL_BSP_MAX_QUEUE_SIZE)",
                *(lost, self.tracing.emitted),
            )


class _Told(SpanExporter):
    """An exporter that says once when spans do not get through, and once when they do again."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self.failing = False
        self.exported = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """In the SDK's thread."""
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # whatever an exporter raises, spans are lost and nothing else
            result = SpanExportResult.FAILURE
            log.debug("the exporter of spans raised", exc_info=error)
        if result is SpanExportResult.SUCCESS:
            self.exported += len(spans)
            if self.failing:
                log.warning("tracing: the collector takes spans again")
        elif not self.failing:
            log.warning(
                "tracing: spans do not reach the collector, and are lost until they do; see tracing.endpoint, or "
                "OTEL_EXPORTER_OTLP_ENDPOINT"
            )
        self.failing = result is not SpanExportResult.SUCCESS
        return result

    def shutdown(self) -> None:
        """No more attempts."""
        self._exporter.shutdown()


def endpoint_of(settings: TracingSettings) -> str | None:
    """The address to send to; None where the environment says it, or nobody does."""
    url = settings.endpoint
    return url.rstrip("/") + TRACES_PATH if url is not None and urlsplit(url).path in ("", "/") else url


def resource_of(settings: TracingSettings, name: str, environ: Mapping[str, str]) -> Resource:
    """Who the spans are from: the settings' service name, else the environment's, else the application's name."""
    service = settings.service_name
    if service is None and not environ.get("OTEL_SERVICE_NAME"):
        service = None if "service.name" in OTELResourceDetector().detect().attributes else name
    return Resource.create({} if service is None else {"service.name": service})
