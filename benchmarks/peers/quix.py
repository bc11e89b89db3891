"""quixstreams: a StreamingDataFrame that decodes, applies the work, encodes and produces, record by record.

Chosen: ``commit_interval`` of a second (each commit flushes the producer, so the default of five would be a little
faster, and every other contestant commits each second too), librdkafka to send larger batches, its broker check and
log off. It is idempotent by default, with acks of all. It decodes and encodes with orjson by itself. There is no way to
hand batches to a function (windows are of event time), so a model gets one record a call.
"""

from __future__ import annotations

from typing import Any

from quixstreams import Application
from quixstreams.models.serializers import (
    BytesDeserializer,
    BytesSerializer,
    JSONDeserializer,
    JSONSerializer,
)

from benchmarks.peers.work import COMMIT_INTERVAL_MS, MAX_BATCH_BYTES, WORKS, Meter, Task


def run(task: Task) -> None:
    """Run until all is written and committed."""
    work, meter = WORKS[task.work], Meter()
    app = Application(
        broker_address=task.bootstrap,
        consumer_group=task.group,
        auto_offset_reset="earliest",
        commit_interval=COMMIT_INTERVAL_MS / 1000,
        auto_create_topics=False,
        use_changelog_topics=False,
        broker_availability_timeout=0,
        loglevel="ERROR",
        producer_extra_config={
            "acks": "all",
            "linger.ms": 5,
            "batch.size": MAX_BATCH_BYTES,
            "batch.num.messages": 100_000,
            "queue.buffering.max.messages": 1_000_000,
            "statistics.interval.ms": 0,
        },
        consumer_extra_config={"statistics.interval.ms": 0},
    )
    is_bytes = task.work == "bytes"
    source = app.topic(task.source, value_deserializer=BytesDeserializer() if is_bytes else JSONDeserializer())
    output = app.topic(
        task.output, value_serializer=BytesSerializer() if is_bytes else JSONSerializer(dumps=work.encode)
    )

    def step(record: Any) -> Any:
        meter.begin()
        return work.apply_one(record)

    app.dataframe(source).apply(step).to_topic(output)
    app.run(count=task.records, collect=False)
    meter.end()


if __name__ == "__main__":
    run(Task.told())
