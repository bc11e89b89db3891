"""Produce requests whose batches are copied once on their way into the connection, and not eight times.

aiokafka encodes a request from the inside out, each level a copy of those below, and puts header and size before it by
adding bytes. For requests of a megabyte that is memory which is fetched from the system and given back each time.

Invariant: what is sent is byte for byte what aiokafka would send.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiokafka.producer.sender import SendProduceReqHandler
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.protocol.types import Array, Bytes, Int32, Schema


def send_in_one_piece(sender: Any) -> Callable[[int, Any], Awaitable[None]]:
    """What an aiokafka sender shall have in the place of its ``_send_produce_req``."""

    async def send(node: int, batches: Any) -> None:
        await _Handler(sender, batches).do(node)
        sender._in_flight.remove(node)  # noqa: SLF001
        for partition in batches:
            sender._muted_partitions.remove(partition)  # noqa: SLF001

    return send


class _Handler(SendProduceReqHandler):  # type: ignore[misc] # aiokafka ships no types
    """aiokafka's, with another request."""

    def create_request(self) -> Any:
        """The request of these batches."""
        request = super().create_request()
        request.__class__ = _Request
        return request


class _Request(ProduceRequest):  # type: ignore[misc] # as above
    """aiokafka's request, encoded otherwise."""

    def prepare(self, versions: Any) -> Any:
        """The request in the version that the broker knows."""
        prepared = super().prepare(versions)
        pieces: list[Any] = []
        _collect(prepared.SCHEMA, [getattr(prepared, name) for name in prepared.SCHEMA.names], pieces)
        prepared.encode = partial(_Body, pieces)
        return prepared


def _collect(field: Any, value: Any, pieces: list[Any]) -> None:
    """The bytes of a value of this type, in pieces; those of the batches as they are."""
    if isinstance(field, Schema):
        for inner, item in zip(field.fields, value, strict=True):
            _collect(inner, item, pieces)
    elif isinstance(field, Array):
        pieces.append(Int32.encode(len(value)))
        for item in value:
            _collect(field.array_of, item, pieces)
    elif field is Bytes:
        pieces += (Int32.encode(len(value)), value)
    else:
        pieces.append(field.encode(value))


class _Body:
    """A request's body, before which aiokafka puts the header."""

    def __init__(self, pieces: list[Any]) -> None:
        self._pieces = pieces

    def __radd__(self, header: bytes) -> _Message:
        return _Message([header, *self._pieces])


class _Message:
    """Header and body, before which aiokafka puts their size."""

    def __init__(self, pieces: list[Any]) -> None:
        self._pieces = pieces

    def __len__(self) -> int:
        return sum([len(piece) for piece in self._pieces])

    def __radd__(self, size: bytes) -> bytes:
        return b"".join([size, *self._pieces])
