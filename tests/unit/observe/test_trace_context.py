"""W3C Trace Context: what the headers say, and what of them counts for nothing."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from streamproc.observe.trace_context import TraceContext, parse_traceparent, parse_tracestate, read, written

VALID = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE, SPAN = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7

contexts = st.builds(
    TraceContext,
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.integers(0, 3),
    st.sampled_from(["", "a=1", "rojo=00f067aa0ba902b7,t61@congo=x y"]),
)
header_values = st.none() | st.binary(max_size=80) | st.from_regex(re.compile(r"[0-9a-f-]{50,60}")).map(str.encode)
headers = st.lists(
    st.tuples(st.sampled_from(["traceparent", "tracestate", "other", "Traceparent"]), header_values), max_size=5
)


@given(context=contexts, others=headers)
def test_what_is_written_is_read_again_and_replaces_what_was_there(
    context: TraceContext, others: list[tuple[str, bytes | None]]
) -> None:
    result = written(others, context)
    assert read(result) == context
    kept = [header for header in others if header[0] not in ("traceparent", "tracestate")]
    assert result[: len(kept)] == kept


@given(headers=headers)
def test_whatever_the_headers_hold_nothing_raises_and_what_is_read_is_well_formed(
    headers: list[tuple[str, bytes | None]],
) -> None:
    context = read(headers)
    if context is not None:
        assert parse_traceparent(context.traceparent.encode()) == context._replace(state="")
        assert parse_tracestate(context.state.encode()) == context.state


@given(value=st.binary(max_size=60) | st.from_regex(r"\A[0-9a-fA-F]{2}-[0-9a-fA-F]{32}-[0-9a-fA-F]{16}-0[0-9]\Z"))
def test_opentelemetry_reads_the_same_of_a_traceparent(value: bytes | str) -> None:
    """But for upper case, which the specification forbids and its propagator takes."""
    raw = value.encode() if isinstance(value, str) else value
    text = raw.decode("latin-1")
    found = parse_traceparent(raw)
    theirs = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": text})).get_span_context()
    if found is not None:
        assert (found.trace_id, found.span_id, found.sampled) == (
            theirs.trace_id,
            theirs.span_id,
            theirs.trace_flags.sampled,
        )
    elif text == text.lower() and len(text) == 55:
        assert not theirs.is_valid


def test_a_traceparent_is_read() -> None:
    assert parse_traceparent(VALID.encode()) == (TRACE, SPAN, 1, "")
    assert parse_traceparent(VALID[:-1].encode() + b"0") == (TRACE, SPAN, 0, "")
    assert parse_traceparent(VALID[:-2].encode() + b"ff") == (TRACE, SPAN, 3, ""), "the flags that have a meaning"


def test_a_later_version_may_say_more_and_is_read_as_far_as_it_is_known() -> None:
    assert parse_traceparent(b"cc" + VALID[2:].encode() + b"-what-the-future-will-be-like") == (TRACE, SPAN, 1, "")
    assert parse_traceparent(b"cc" + VALID[2:].encode()) == (TRACE, SPAN, 1, "")
    assert parse_traceparent(b"cc" + VALID[2:].encode() + b".what") is None


@pytest.mark.parametrize(
    "value",
    [
        "",
        VALID[:-1],
        VALID + "0",
        VALID + "-more",
        VALID + "\n",
        " " + VALID,
        "ff" + VALID[2:],
        VALID.upper(),
        VALID.replace("-", "_"),
        "00-" + 32 * "0" + VALID[35:],
        VALID[:36] + 16 * "0" + VALID[52:],
        VALID.replace("4bf9", "4bg9"),
        "٠" + VALID[1:],
    ],
)
def test_a_malformed_traceparent_counts_for_nothing(value: str) -> None:
    assert parse_traceparent(value.encode()) is None
    assert read([("traceparent", value.encode()), ("tracestate", b"a=1")]) is None


def test_of_two_traceparents_none_counts_and_several_tracestates_are_one() -> None:
    one = ("traceparent", VALID.encode())
    assert read([one, one]) is None
    assert read([("tracestate", b"a=1")]) is None
    assert read([one, ("tracestate", b"a=1, b=2"), ("tracestate", b""), ("tracestate", b"c=3")]) == (
        *(TRACE, SPAN, 1),
        "a=1,b=2,c=3",
    )


@pytest.mark.parametrize(
    "value",
    ["a", "a=1,a=2", "A=1", "a=1=2", "a=ü", "=1", "a=", "a@=1", "a=1;b=2,=", "a=" + 257 * "x", "a=1\tb"],
)
def test_a_malformed_tracestate_counts_for_nothing_and_leaves_the_traceparent(value: str) -> None:
    assert read([("traceparent", VALID.encode()), ("tracestate", value.encode())]) == (TRACE, SPAN, 1, "")


def test_a_tracestate_has_32_members_at_most() -> None:
    members = [f"k{number}=1" for number in range(33)]
    assert parse_tracestate(",".join(members[:32]).encode()) == ",".join(members[:32])
    assert parse_tracestate(",".join(members).encode()) == ""
