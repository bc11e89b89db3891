"""What a pipeline's tests need in place of Kafka.

``MemoryBroker`` stands in for a cluster: topics, partitions, offsets with gaps, groups that rebalance and tell their
members, commits that a later generation rejects, size limits. Its clients behave as those for Kafka do; one contract
suite holds both to it. It belongs to one event loop, has no thread, sleeps nowhere, and does the same every time.

    broker = MemoryBroker()
    broker.create_topic("texts", partitions=2)
    broker.append("texts", b'{"text": "fine"}')
    consumer = broker.consumer(group_id="app.text")
    broker.fail_next("commit", BrokerError("no"))     # the next commit fails
    with broker.acknowledgements_held():              # nothing is acknowledged within
        ...
"""

from streamproc.broker.memory import MemoryAdmin, MemoryBroker, Operation
from streamproc.broker.memory_clients import MemoryBatch, MemoryConsumer, MemoryProducer
from streamproc.broker.memory_log import MemoryRecord

__all__ = [
    "MemoryAdmin",
    "MemoryBatch",
    "MemoryBroker",
    "MemoryConsumer",
    "MemoryProducer",
    "MemoryRecord",
    "Operation",
]
