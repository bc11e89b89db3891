"""A consumer whose polls a test answers by hand: the source runs without an event loop, one poll at a time."""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Mapping, Sequence
from typing import Any

from streamproc.records import Record, TopicPartition

Polled = Mapping[TopicPartition, Sequence[Record]]


class _Poll:
    def __await__(self) -> Generator[None, Polled, Polled]:
        return (yield)


class HandConsumer:
    """The part of ``interface.Consumer`` that the source uses."""

    def __init__(self) -> None:
        self.paused: set[TopicPartition] = set()
        self.wanted = 0
        """How many records the poll that is out may bring."""
        self._running: Coroutine[Any, Any, None] | None = None

    async def getmany(self, *, timeout_ms: int, max_records: int) -> Polled:
        """Wait until ``answer`` is called."""
        del timeout_ms
        self.wanted = max_records
        return await _Poll()

    def pause(self, *partitions: TopicPartition) -> None:
        """Bring nothing of these."""
        assert not self.paused & set(partitions), "paused twice"
        self.paused |= set(partitions)

    def resume(self, *partitions: TopicPartition) -> None:
        """Bring records of these again."""
        assert self.paused >= set(partitions), "resumed, and was not paused"
        self.paused -= set(partitions)

    def run(self, source: Coroutine[Any, Any, None]) -> None:
        """Run the source up to its first poll."""
        self._running = source
        source.send(None)

    def answer(self, polled: Polled) -> None:
        """Answer the poll that is out, and run the source up to the next one."""
        assert self._running is not None
        assert not self.paused & set(polled)
        assert sum(len(some) for some in polled.values()) <= self.wanted
        self._running.send(polled)

    def close(self) -> None:
        """End the source."""
        if self._running is not None:
            self._running.close()
