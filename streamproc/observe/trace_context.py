"""W3C Trace Context: the headers `traceparent` and `tracestate`, read and written.

Pure functions, and nothing of OpenTelemetry. Whatever stands in the headers, nothing raises: a `traceparent` that is
malformed, or there twice, counts for nothing, and the `tracestate` beside it neither; a malformed `tracestate` counts
for nothing by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from streamproc.records import Trace

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
SAMPLED = 0x01
RANDOM = 0x02
"""Says that the trace id is random, and is handed on with it."""
MAX_MEMBERS = 32
MAX_STATE_CHARS = 8_192
"""Of a `tracestate` that is handed on: far more than the 512 that have to be."""

Headers = Sequence[tuple[str, bytes | None]]

# A later version than 00 may say more behind a further dash.
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_KEY = r"(?:[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
_VALUE = r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
_MEMBER = re.compile(f"({_KEY})=({_VALUE})")


class TraceContext(NamedTuple):
    """A span as others see it: the parent of what follows from it."""

    trace_id: int
    span_id: int
    flags: int
    state: str = ""
    """The `tracestate`, normalized; empty where there is none."""

    @property
    def sampled(self) -> bool:
        """Whether whoever made it records its span."""
        return bool(self.flags & SAMPLED)

    @property
    def traceparent(self) -> str:
        """As a header's value."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}"


def read(headers: Iterable[tuple[str, bytes | None]]) -> TraceContext | None:
    """What the headers say of the span that they come from; None where they say nothing that counts."""
    parents: list[bytes | None] = []
    states: list[bytes] = []
    for name, value in headers:
        if name == TRACEPARENT:
            parents.append(value)
        elif name == TRACESTATE:
            states.append(value or b"")
    if len(parents) != 1:
        return None
    parent = parse_traceparent(parents[0] or b"")
    if parent is None or not states:
        return parent
    return parent._replace(state=parse_tracestate(b",".join(states)))


def parse_traceparent(value: bytes) -> TraceContext | None:
    """The span that a `traceparent` names; None where it is malformed."""
    found = _TRACEPARENT.fullmatch(value)
    if found is None:
        return None
    version, trace_id, span_id = found.group(1), int(found.group(2), 16), int(found.group(3), 16)
    if version == b"ff" or (version == b"00" and found.group(5) is not None) or not trace_id or not span_id:
        return None
    return TraceContext(trace_id, span_id, int(found.group(4), 16) & (SAMPLED | RANDOM))


def parse_tracestate(value: bytes) -> str:
    """A `tracestate` as it is handed on, without space and empty members; empty where it is malformed."""
    if len(value) > MAX_STATE_CHARS or not value.isascii():
        return ""
    members = [member for part in value.decode("ascii").split(",") if (member := part.strip(" \t"))]
    found = [_MEMBER.fullmatch(member) for member in members]
    keys = {it.group(1) for it in found if it is not None}
    return ",".join(members) if len(keys) == len(members) <= MAX_MEMBERS else ""


def written(headers: Headers, context: TraceContext) -> list[tuple[str, bytes | None]]:
    """The headers, with this context in the place of any other."""
    kept = [header for header in headers if header[0] not in (TRACEPARENT, TRACESTATE)]
    kept.append((TRACEPARENT, context.traceparent.encode()))
    if context.state:
        kept.append((TRACESTATE, context.state.encode()))
    return kept


def context_of(trace: Trace, span_id: int | None = None) -> TraceContext:
    """The span of a trace, or another of its trace, as others shall see it."""
    return TraceContext(trace.trace_id, span_id or trace.span_id, trace.flags, trace.state)


def trace_id_of(traceparent: str | None) -> str | None:
    """The trace of a well-formed `traceparent`, for the log."""
    return None if traceparent is None else traceparent.split("-")[1]
