"""Produce requests are, byte for byte, those that aiokafka would send."""

from __future__ import annotations

import gc
import struct
import weakref
from typing import Any

from aiokafka.protocol.produce import ProduceRequest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.broker.produce_requests import _Request

topics = st.lists(
    st.tuples(st.text(max_size=9), st.lists(st.tuples(st.integers(0, 99), st.binary(max_size=50)), max_size=3)),
    max_size=3,
)


@given(
    topics=topics,
    transactional_id=st.none() | st.text(max_size=5),
    version=st.sampled_from([it.API_VERSION for it in ProduceRequest._CLASSES]),
)
def test_in_every_version_the_bytes_are_the_same(topics: Any, transactional_id: str | None, version: int) -> None:
    arguments = (transactional_id if version >= 3 else None, -1, 1_000, topics)
    versions = {ProduceRequest.API_KEY: (version, version)}
    theirs, ours = (it(*arguments).prepare(versions) for it in (ProduceRequest, _Request))
    header = ours.build_request_header(correlation_id=1, client_id="test").encode()
    expected = header + theirs.encode()
    message = header + ours.encode()
    size = struct.pack(">i", len(message))
    assert size + message == struct.pack(">i", len(expected)) + expected
    assert type(ours) is type(theirs)
    assert repr(ours) == repr(theirs)


def test_a_request_leaves_memory_once_nobody_has_it() -> None:
    """In a cycle its batches would stay until Python looks for cycles, which is seldom."""
    gc.disable()
    try:
        arguments = (None, -1, 1_000, [("out", [(0, b"batch")])])
        prepared = _Request(*arguments).prepare({ProduceRequest.API_KEY: (7, 7)})
        prepared.encode()
        gone = weakref.ref(prepared)
        del prepared
        assert gone() is None
    finally:
        gc.enable()
