"""What Kafka can do to ``streamproc run``: nodes, topics, rights and names that change while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.kafka.kafka import KafkaCluster
from tests.acceptance.test_streams import PARTITIONS, Stream
from tests.support.app import App, source

Names = Callable[..., str]
DELIVERIES = ("at_least_once", "exactly_once")
SESSION_MS = 6_000


@pytest.fixture(scope="module")
def cluster(kafka_available: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:  # noqa: ARG001
    with KafkaCluster(tmp_path_factory.mktemp("kafka"), heap_mb=384) as it:
        yield it


@pytest.fixture
def kafka(cluster: KafkaCluster) -> str:
    return cluster.bootstrap_servers


def stream_of(kafka: str, name: str, delivery: str = "at_least_once", **task: Any) -> Stream:
    task = {"commit_interval_ms": 100, "batch": {"max_size": 64, "max_wait_ms": 5}, **task}
    stream = Stream(kafka, name, "Identity", delivery=delivery, **task)
    stream.settings["kafka"] |= {"session_timeout_ms": SESSION_MS, "request_timeout_ms": 8_000}
    stream.settings["pool"]["workers"] = 1
    return stream


def numbered(count: int, first: int = 0) -> list[bytes | None]:
    return [b'{"id": %d}' % index for index in range(first, first + count)]


def all_committed(stream: Stream) -> Callable[[dict[str, Any]], bool]:
    return lambda _: stream.committed() == {partition: end for partition, end in stream.ends().items() if end}


def assigned(status: dict[str, Any]) -> int:
    return len(status["tasks"]["main"]["partitions"])


# ------------------------------------------------------------------------------------------------- static membership


def static(stream: Stream, instance: str) -> dict[str, Any]:
    return {**stream.settings, "kafka": {**stream.settings["kafka"], "group_instance_id": instance}}


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_replica_with_a_name_that_is_back_within_its_session_causes_no_rebalance(
    kafka: str, tmp_path: Path, topic_name: Names, delivery: str
) -> None:
    stream = stream_of(kafka, topic_name(), delivery)
    stream.settings["kafka"]["session_timeout_ms"] = 30_000
    with App(tmp_path / "one", static(stream, "one")) as one, App(tmp_path / "two", static(stream, "two")) as two:
        for app in (one, two):
            app.until(lambda status: assigned(status) == PARTITIONS // 2, "each has a half")
        before = two.metric("streamproc_rebalances_total")
        stream.produce(numbered(3_000))
        one.until(lambda status: status["tasks"]["main"]["counts"]["out"] > 0, "it writes results")
        one.process.kill()
        one.process.wait()
        committed = stream.committed()
        stream.produce(numbered(3_000, first=3_000))
        with App(tmp_path / "one again", static(stream, "one")) as again:
            again.until(all_committed(stream), "everything is committed")
            assert assigned(again.get("/status").json()) == PARTITIONS // 2
            assert two.metric("streamproc_rebalances_total") == before
            assert again.terminate() == 0
        assert two.terminate() == 0
    seen = Counter(source(it) for it in stream.results())
    assert set(seen) == {(p, o) for p, end in stream.ends().items() for o in range(end)}
    again_and_again = {it for it, count in seen.items() if count > 1}
    if delivery == "exactly_once":
        assert not again_and_again
    assert all(offset >= committed.get(partition, 0) for partition, offset in again_and_again)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_of_two_replicas_with_one_name_the_first_stops_with_one_sentence(
    kafka: str, tmp_path: Path, topic_name: Names, delivery: str
) -> None:
    stream = stream_of(kafka, topic_name(), delivery)
    with App(tmp_path / "first", static(stream, "twin")) as first:
        first.until_ready()
        stream.produce(numbered(1_200))
        with App(tmp_path / "second", static(stream, "twin")) as second:
            assert first.process.wait(60) == 1
            told = [line for line in first.log().splitlines() if "group_instance_id" in line]
            assert len(told) == 1, first.log()
            assert "another replica has taken over the name twin" in told[0]
            stream.produce(numbered(1_200, first=1_200))
            second.until(all_committed(stream), "the second goes on")
            assert second.metric("streamproc_rebalances_total") == 1
            assert second.terminate() == 0
    stream.results()
    seen = Counter(source(it) for it in stream.results())
    assert set(seen) == {(p, o) for p, end in stream.ends().items() for o in range(end)}
    if delivery == "exactly_once":
        assert set(seen.values()) == {1}
