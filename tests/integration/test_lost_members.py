"""A member of a group that is cut off from Kafka: what it reads, and what it is told, when it comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.kafka.kafka import KafkaCluster, free_ports
from streamproc.broker.consumer import KafkaConsumer
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings
from tests.chaos.proxy import HOST, Way
from tests.support.app import create, produce
from tests.support.asyncs import until

TOPIC, GROUP = "in", "group"
AT = TopicPartition(TOPIC, 0)


class Member:
    """A consumer that is polled all the time, and what came of it."""

    def __init__(self, bootstrap_servers: str) -> None:
        settings = KafkaSettings(bootstrap_servers=bootstrap_servers, session_timeout_ms=1_000)
        self.consumer = KafkaConsumer(settings, group_id=GROUP, client_id="test")
        self.told: list[Any] = []
        self.values: list[bytes | None] = []
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.consumer.start([TOPIC], self._revoked, self._assigned)
        self._polling = asyncio.get_running_loop().create_task(self._poll())

    async def stop(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.gather(self._polling, return_exceptions=True)
        await self.consumer.stop()

    async def _poll(self) -> None:
        while True:
            for records in (await self.consumer.getmany(timeout_ms=50, max_records=1_000)).values():
                self.told.append("records")
                self.values += [record.value for record in records]

    async def _revoked(self, partitions: set[TopicPartition]) -> None:
        self.told.append(("revoked", len(partitions), self.consumer.is_member()))

    async def _assigned(self, partitions: set[TopicPartition]) -> None:
        self.told.append(("assigned", len(partitions)))


@pytest.mark.usefixtures("kafka_available")
def test_a_member_that_was_missed_reads_nothing_of_what_is_anothers_and_is_told_that_it_was_missed(
    tmp_path: Path, run: Callable[..., Any]
) -> None:
    port = free_ports(1)[0]

    async def story(cluster: KafkaCluster) -> None:
        way = Way(port, cluster.extra_ports["R1"][1])
        await way.open()
        lost, other = Member(f"{HOST}:{port}"), Member(cluster.bootstrap_servers)
        try:
            await lost.start()
            await until(lambda: lost.values == [b"1"], "the first record is read")
            await way.cut("black_hole")
            await other.start()  # which waits for the end of the lost one's session
            await until(lambda: other.values == [b"1"], "the partition has moved")
            await asyncio.to_thread(produce, cluster.bootstrap_servers, TOPIC, {0: [(None, b"2")]})
            await until(lambda: other.values == [b"1", b"2"], "the new owner reads on")
            assert lost.told == [("assigned", 1), "records"]
            await way.heal()
            await until(lambda: len(lost.told) >= 4, "it is back")
            assert lost.told[2] == ("revoked", 1, False)
            assert lost.told[3] in (("assigned", 0), ("assigned", 1))
            assert lost.consumer.is_member()
        finally:
            await way.close()
            await asyncio.gather(lost.stop(), other.stop())

    with KafkaCluster(tmp_path / "kafka", extra_listeners={"R1": {1: port}}) as cluster:
        create(cluster.bootstrap_servers, {TOPIC: 1})
        produce(cluster.bootstrap_servers, TOPIC, {0: [(None, b"1")]})
        run(story(cluster), timeout_s=90)
