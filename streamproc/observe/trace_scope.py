"""The batch's span as the current one in a worker, so that the spans which a backend makes itself are its children.

Nothing of OpenTelemetry is imported before the first batch that is traced, and nothing where it is not installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from streamproc.observe.trace_context import parse_traceparent


@contextlib.contextmanager
def batch_span(traceparent: str) -> Iterator[None]:
    """Within, OpenTelemetry's current span is the one that this names; the parent makes it once the batch has ended."""
    context = parse_traceparent(traceparent.encode())
    try:
        from opentelemetry import context as contexts  # noqa: PLC0415 - as the module says
        from opentelemetry import trace  # noqa: PLC0415 - as above
    except ImportError:
        context = None
    if context is None:
        yield
        return
    span = trace.SpanContext(context.trace_id, context.span_id, True, trace.TraceFlags(context.flags))
    token = contexts.attach(trace.set_span_in_context(trace.NonRecordingSpan(span)))
    try:
        yield
    finally:
        contexts.detach(token)
