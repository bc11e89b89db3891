"""The Kafka of a chaos run: three nodes with a listener per replica, the network before them, the topics.

The nodes are started and killed in one thread of their own, since that waits, and since Kafka's processes end with the
thread that started them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from deploy.kafka.kafka import KafkaCluster, free_ports
from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.connection import all_topics, first_connection, read_topics
from streamproc.broker.interface import NewTopic
from streamproc.errors import BrokerError
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings
from tests.chaos.proxy import Network, Way
from tests.chaos.schedule import EXTRA_REPLICA, NODES

T = TypeVar("T")
HEAP_MB = 384
START_WITHIN_S = 300.0
ASK_TIMEOUT_S = 5.0
KNOWN_WITHIN_S = 60.0
POLL_S = 0.1
PROPERTIES = {
    # A transaction whose producer is gone is in the way of everyone who reads what is committed.
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
    "log.segment.bytes": str(64 << 20),
}
REPLICAS = range(1, EXTRA_REPLICA + 1)


class Cluster:
    """The nodes and the network of one run; an asynchronous context manager."""

    def __init__(self, directory: Path) -> None:
        pairs = [(replica, node) for replica in REPLICAS for node in range(1, NODES + 1)]
        ports = dict(zip(pairs, free_ports(len(pairs)), strict=True))
        listeners = {
            f"R{replica}": {node: port for (it, node), port in ports.items() if it == replica} for replica in REPLICAS
        }
        self._kafka = KafkaCluster(
            directory, nodes=NODES, heap_mb=HEAP_MB, properties=PROPERTIES, extra_listeners=listeners
        )
        self.network = Network(
            {pair: Way(port, self._kafka.extra_ports[f"R{pair[0]}"][pair[1]]) for pair, port in ports.items()}
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kafka")
        self.bootstrap_servers = self._kafka.bootstrap_servers
        self.settings = KafkaSettings(bootstrap_servers=self.bootstrap_servers)
        self._admin: KafkaAdmin | None = None

    async def __aenter__(self) -> Self:
        try:
            # First: while the nodes start, somebody else may take a port that nobody listens at.
            await self.network.open()
            await self._in_thread(lambda: self._kafka.start(START_WITHIN_S))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close_admin()
        await self.network.close()
        # Their logs are worth keeping, whoever calls decides about the rest.
        await self._in_thread(lambda: self._kafka.stop(keep=True, timeout_s=2.0))
        self._thread.shutdown()

    async def kill(self, node: int) -> None:
        """End a node without warning."""
        await self._in_thread(lambda: self._kafka.kill(node))

    async def restart(self, node: int) -> None:
        """Start it again; returns when it is a member of the cluster."""
        await self._in_thread(lambda: self._kafka.restart(node, START_WITHIN_S))

    async def why_not_in_sync(self) -> str | None:
        """What keeps the cluster from standing the loss of a node, as a sentence; None when nothing does."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap_servers, request_timeout_ms=3_000)
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                await admin.start()
                try:
                    topics = await admin.describe_topics()
                finally:
                    await admin.close()
        except (KafkaError, OSError, TimeoutError) as error:
            return f"it does not answer: {error!r}"
        behind = [
            f"{topic['topic']}-{partition['partition']}"
            for topic in topics
            for partition in topic["partitions"]
            if len(partition["isr"]) < NODES
        ]
        return f"{len(behind)} partitions are not in sync, as {behind[0]}" if behind else None

    async def create_topics(self, topics: Mapping[str, int], configs: Mapping[str, str]) -> None:
        """Topics by name and number of partitions, on every node."""
        async with KafkaAdmin(self.settings) as admin:
            await admin.create_topics(
                [NewTopic(name, partitions, NODES, configs) for name, partitions in topics.items()]
            )

    async def until_known(self, topics: Sequence[str]) -> None:
        """Wait until every node tells its clients of these topics: one is enough for who creates them."""
        for address in self.bootstrap_servers.split(","):
            settings = KafkaSettings(bootstrap_servers=address)
            async with asyncio.timeout(KNOWN_WITHIN_S), first_connection(settings, "chaos") as connection:
                while True:
                    known = await read_topics(connection.send(all_topics()), settings)
                    if known.keys() >= set(topics):
                        break
                    await asyncio.sleep(POLL_S)

    async def committed(self, group: str, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int] | None:
        """A group's committed offsets; None while the cluster does not say."""
        found: Mapping[TopicPartition, int] | None = await self._ask(lambda admin: admin.committed(group, partitions))
        return found

    async def _ask(self, question: Callable[[KafkaAdmin], Any]) -> Any:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                if self._admin is None:
                    self._admin = await KafkaAdmin(self.settings).__aenter__()
                return await question(self._admin)
        except (BrokerError, KafkaError, OSError, TimeoutError):
            await self._close_admin()
            return None

    async def _close_admin(self) -> None:
        admin, self._admin = self._admin, None
        if admin is not None:
            await admin.__aexit__()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
