"""The load: records for the tasks' input topics at a steady rate, straight to the nodes.

It goes by the clock: what a stall delayed is written afterwards. Of each partition one batch at a time is on its way,
and the next one gathers meanwhile: a cluster that is slow gets larger batches, not a queue of small ones. What the
cluster acknowledged is counted per partition, so that the oracle can tell records that the cluster lost from records
that streamproc lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from streamproc.broker.producer import KafkaProducer
from streamproc.settings import KafkaSettings
from tests.chaos.records import PARTITIONS, key_of, value_of

TICK_S = 0.1


class Load:
    """Writes ``rate`` records a second to each topic, over its partitions in turn."""

    def __init__(self, bootstrap_servers: str, topics: Sequence[str], rate: float) -> None:
        self._producer = KafkaProducer(
            KafkaSettings(bootstrap_servers=bootstrap_servers, request_timeout_ms=10_000),
            client_id="chaos-load",
            max_queued_batches=len(topics) * PARTITIONS,
        )
        self._rate = rate
        self.written = {topic: [0] * PARTITIONS for topic in topics}
        """Records handed to the producer, by topic and partition; numbered from 0 in each."""
        self.acknowledged = {topic: [0] * PARTITIONS for topic in topics}
        self.errors: list[str] = []
        """Batches that the cluster did not acknowledge: what is in the topic counts."""
        self.seconds = 0.0
        self._stopped = asyncio.Event()
        self._sent: dict[tuple[str, int], asyncio.Future[object]] = {}
        """The batch of each partition that is on its way."""

    async def run(self) -> None:
        """Write until ``stop``, then wait for every acknowledgement."""
        await self._producer.start()
        begun = time.monotonic()
        try:
            while not self._stopped.is_set():
                self.seconds = time.monotonic() - begun
                due = int(self.seconds * self._rate)
                for topic in self.written:
                    for partition in range(PARTITIONS):
                        await self._write(topic, partition, (due + PARTITIONS - 1 - partition) // PARTITIONS)
                try:
                    await asyncio.wait_for(self._stopped.wait(), TICK_S - (time.monotonic() - begun) % TICK_S)
                except TimeoutError:
                    continue
            if self._sent:
                await asyncio.wait(self._sent.values())
        finally:
            await self._producer.stop()

    def stop(self) -> None:
        """Write no more."""
        self._stopped.set()

    async def _write(self, topic: str, partition: int, upto: int) -> None:
        """Write a partition's records up to the one with number ``upto``, unless it is busy with those before."""
        written = self.written[topic]
        if (topic, partition) in self._sent or written[partition] >= upto:
            return
        batch = self._producer.create_batch()
        first = number = written[partition]
        while number < upto and batch.append(
            timestamp=None, key=key_of(number), value=value_of(partition, number), headers=[]
        ):
            number += 1
        written[partition] = number
        sent = self._sent[topic, partition] = await self._producer.send_batch(batch, topic, partition)
        sent.add_done_callback(lambda done: self._answered(done, topic, partition, number - first))

    def _answered(self, sent: asyncio.Future[object], topic: str, partition: int, count: int) -> None:
        del self._sent[topic, partition]
        error = sent.exception()
        if error is None:
            self.acknowledged[topic][partition] += count
        else:
            self.errors.append(f"{topic}, partition {partition}: {error}")
