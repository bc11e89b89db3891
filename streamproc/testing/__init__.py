"""What the tests of a stream need: the whole pipeline in memory, golden files, a backend alone, a broker's stand-in.

``Pipeline`` is the real processor with the user's backend in real worker processes; only Kafka is not there:

    with Pipeline("streamproc.yaml") as pipeline:
        outputs = pipeline.process([{"text": "fine"}])
        assert outputs.values == [{"text": "fine", "score": 1.0}]
        assert_golden(outputs, "golden/texts.jsonl")

``run_backend`` runs records through a backend without anything else. The pytest plugin, which is there wherever
streamproc is installed, has the fixtures ``pipeline``, ``streamproc_settings`` and ``streamproc_broker``.

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

Everything is imported when it is first used: pytest loads the plugin in every project.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamproc.broker.memory import MemoryAdmin, MemoryBroker, Operation
    from streamproc.broker.memory_clients import MemoryBatch, MemoryConsumer, MemoryProducer, MemoryReader
    from streamproc.broker.memory_log import MemoryRecord
    from streamproc.testing.backend_run import run_backend
    from streamproc.testing.golden import GoldenError, assert_golden
    from streamproc.testing.pipeline import NotInTimeError, Outputs, Pipeline

__all__ = [
    "GoldenError",
    "MemoryAdmin",
    "MemoryBatch",
    "MemoryBroker",
    "MemoryConsumer",
    "MemoryProducer",
    "MemoryReader",
    "MemoryRecord",
    "NotInTimeError",
    "Operation",
    "Outputs",
    "Pipeline",
    "assert_golden",
    "run_backend",
]

_HOME = {
    "GoldenError": "streamproc.testing.golden",
    "MemoryAdmin": "streamproc.broker.memory",
    "MemoryBatch": "streamproc.broker.memory_clients",
    "MemoryBroker": "streamproc.broker.memory",
    "MemoryConsumer": "streamproc.broker.memory_clients",
    "MemoryProducer": "streamproc.broker.memory_clients",
    "MemoryReader": "streamproc.broker.memory_clients",
    "MemoryRecord": "streamproc.broker.memory_log",
    "NotInTimeError": "streamproc.testing.pipeline",
    "Operation": "streamproc.broker.memory",
    "Outputs": "streamproc.testing.pipeline",
    "Pipeline": "streamproc.testing.pipeline",
    "assert_golden": "streamproc.testing.golden",
    "run_backend": "streamproc.testing.backend_run",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
