"""What Kafka can do to ``streamproc run``: nodes, topics, rights and names that change while it runs."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest

from deploy.kafka.kafka import SASL_PASSWORD, SASL_USER, KafkaCluster
from streamproc.broker.admin import KafkaAdmin
from tests.acceptance.test_streams import PARTITIONS, Stream
from tests.support.app import (
    ROOT,
    App,
    Row,
    committed,
    create,
    ends,
    headers,
    kafka_settings,
    produce,
    read_to_end,
    source,
)
from tests.support.asyncs import wait_until

Names = Callable[..., str]
T = TypeVar("T")
DELIVERIES = ("at_least_once", "exactly_once")
SESSION_MS = 6_000
TOPIC, GROUP, READ, WRITE = 2, 3, 3, 4
"""Of Kafka's ACLs: kinds of resources, and operations."""


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


# ------------------------------------------------------------------------------------------------------------ topics


def admin(kafka: str, question: Callable[[KafkaAdmin], Awaitable[T]]) -> T:
    async def go() -> T:
        async with KafkaAdmin(kafka_settings(kafka)) as it:
            return await question(it)

    return asyncio.run(go())


def delete(kafka: str, topic: str) -> None:
    admin(kafka, lambda it: it.delete_topics([topic]))


def configure(kafka: str, topic: str, config: str, value: str) -> None:
    admin(kafka, lambda it: it.set_configs(topic, {config: value}))


def grow(kafka: str, topic: str, total: int) -> None:
    admin(kafka, lambda it: it.add_partitions(topic, total))


def exists(kafka: str, topic: str) -> bool:
    return topic in admin(kafka, lambda it: it.topics())


def only_error(app: App) -> str:
    """What it said when it ended: one line, and no traceback."""
    told = [line for line in app.log().splitlines() if '"level":"error"' in line]
    assert len(told) == 1, app.log()
    assert "exception" not in json.loads(told[0])
    return str(json.loads(told[0])["message"])


@pytest.mark.parametrize("anew", [False, True], ids=["deleted", "created anew"])
@pytest.mark.parametrize("delivery", DELIVERIES)
def test_an_input_topic_that_goes_stops_the_processor_with_one_sentence_and_its_successor_is_read_whole(
    kafka: str, tmp_path: Path, topic_name: Names, delivery: str, anew: bool
) -> None:
    stream = stream_of(kafka, topic_name(), delivery)
    with App(tmp_path / "first", stream.settings) as app:
        app.until_ready()
        stream.produce(numbered(600))
        app.until(all_committed(stream), "the first ones are done")
        delete(kafka, stream.topic)
        if anew:
            wait_until(lambda: not exists(kafka, stream.topic), "it is gone", deadline_s=60)
            create(kafka, {stream.topic: PARTITIONS})
            stream.produce(numbered(1_200))
        assert app.process.wait(60) == 1
    told = only_error(app)
    assert stream.topic in told
    assert ("created anew" if anew else "does not exist any more") in told
    if anew:
        with App(tmp_path / "second", stream.settings) as app:
            app.until(all_committed(stream), "the new one is read")
            assert app.terminate() == 0
        told_of = Counter(source(it) for it in stream.results())
        assert set(told_of) == {(p, o) for p, end in stream.ends().items() for o in range(end)}


@pytest.mark.parametrize("output", ["results", "dead"])
@pytest.mark.parametrize("delivery", DELIVERIES)
def test_an_output_topic_that_is_created_again_in_time_gets_everything_that_was_not_acknowledged(
    kafka: str, tmp_path: Path, topic_name: Names, delivery: str, output: str
) -> None:
    stream = stream_of(kafka, topic_name(), delivery)
    stream.settings["kafka"]["request_timeout_ms"] = 60_000
    stream.settings["tasks"]["main"]["on_error"] = {"circuit": {"enabled": False}}
    broken: list[bytes | None] = [b"no JSON %d" % index for index in range(1_800)]
    values = numbered(1_800) if output == "results" else broken
    with App(tmp_path, stream.settings) as app:
        app.until_ready()
        stream.produce(values[:600])
        app.until(all_committed(stream), "the first ones are done")
        delete(kafka, f"{stream.topic}.{output}")
        stream.produce(values[600:])
        app.until(lambda _: "does not exist any more" in app.log(), "it is noticed")
        create(kafka, {f"{stream.topic}.{output}": PARTITIONS})
        app.until(all_committed(stream), "the others are done")
        assert app.terminate() == 0
    if output == "results":
        told = sorted(json.loads(it.value or b"")["result"]["id"] for it in stream.results())
        assert told == list(range(600, 1_800))
    else:
        assert Counter(it.value for it in stream.dead()) == Counter(values[600:])


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_result_topic_that_does_not_come_back_stops_the_processor_and_commits_nothing(
    kafka: str, tmp_path: Path, topic_name: Names, delivery: str
) -> None:
    stream = stream_of(kafka, topic_name(), delivery)
    with App(tmp_path, stream.settings) as app:
        app.until_ready()
        stream.produce(numbered(600))
        app.until(all_committed(stream), "the first ones are done")
        before = stream.committed()
        delete(kafka, f"{stream.topic}.results")
        stream.produce(numbered(600, first=600))
        assert app.process.wait(90) == 1
    told = only_error(app)
    assert f"{stream.topic}.results" in told
    assert "create it with `streamproc topics apply`" in told
    assert stream.committed() == before


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_metrics_topic_that_goes_stops_nothing(kafka: str, tmp_path: Path, topic_name: Names, delivery: str) -> None:
    stream = stream_of(kafka, topic_name(), delivery)
    with App(tmp_path, stream.settings) as app:
        app.until_ready()
        stream.produce(numbered(600))
        app.until(all_committed(stream), "the first ones are done")
        delete(kafka, f"{stream.topic}.metrics")
        for first in range(600, 6_000, 600):
            stream.produce(numbered(600, first=first))
            app.until(all_committed(stream), "these are done")
        create(kafka, {f"{stream.topic}.metrics": 1})
        app.until(lambda _: "is there again" in app.log(), "it is noticed")
        stream.produce(numbered(600, first=6_000))
        app.until(lambda _: bool(stream.metrics()), "metrics are written again")
        app.until(all_committed(stream), "the last ones are done")
        assert app.terminate() == 0
    assert app.log().count("metrics records are lost") == 1
    stream.check_complete()


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_topics_that_grow_are_read_whole_and_keys_keep_their_partition_of_the_results(
    kafka: str, tmp_path: Path, topic_name: Names, delivery: str
) -> None:
    stream = stream_of(kafka, topic_name(), delivery)
    more = PARTITIONS + 3
    with App(tmp_path, stream.settings) as app:
        app.until_ready()
        stream.produce(numbered(600))
        grow(kafka, stream.topic, more)
        grow(kafka, f"{stream.topic}.results", more)
        keyed: list[Row] = [(b"key %d" % (index % 7), b'{"id": %d}' % index) for index in range(600, 1_200)]
        produce(kafka, stream.topic, {partition: keyed[partition::more] for partition in range(more)})
        done = {p: end for p, end in ends(kafka, stream.topic, more).items() if end}
        app.until(lambda status: assigned(status) == more, "the new partitions are noticed")
        app.until(
            lambda _: committed(kafka, f"{stream.topic}.main", stream.topic, more) == done, "everything is committed"
        )
        assert app.terminate() == 0
    results = read_to_end(kafka, f"{stream.topic}.results", more)
    assert Counter(source(it) for it in results) == Counter((p, o) for p, end in done.items() for o in range(end))
    assert {it.partition for it in results} == set(range(PARTITIONS))
    of_new = [it for it in results if source(it)[0] >= PARTITIONS]
    by_key = {it.key: it.partition for it in of_new}
    assert all(by_key[it.key] == it.partition for it in of_new), "a key has one partition"


# ------------------------------------------------------------------------------------------- results that are refused


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_result_topic_that_takes_less_than_before_gets_dead_letters_instead(
    kafka: str, tmp_path: Path, topic_name: Names, delivery: str
) -> None:
    stream = stream_of(kafka, topic_name(), delivery)
    with App(tmp_path, stream.settings) as app:
        app.until_ready()
        stream.produce(numbered(60))
        app.until(all_committed(stream), "the first ones are done")
        configure(kafka, f"{stream.topic}.results", "max.message.bytes", "3000")
        large: list[bytes | None] = [
            b'{"id": %d, "pad": "%s"}' % (index, b"x" * (4_000 if index % 10 == 0 else 100)) for index in range(600)
        ]
        stream.produce(large)
        app.until(all_committed(stream), "all are done")
        assert app.terminate() == 0
    assert len(stream.results()) == 60 + 540
    dead = stream.dead()
    assert len(dead) == 60
    assert {headers(it)["streamproc-cause"] for it in dead} == {"too_large"}
    told = Counter([source(it) for it in stream.results()])
    told.update((it.partition, int(headers(it)["streamproc-source-offset"])) for it in dead)
    assert told == Counter((p, o) for p, end in stream.ends().items() for o in range(end))


@pytest.fixture(scope="module")
def cluster(kafka_available: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:  # noqa: ARG001
    """Three nodes with rights: who does not log in may do everything, the others what nobody has denied."""
    rights = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        "allow.everyone.if.no.acl.found": "true",
    }
    directory = tmp_path_factory.mktemp("cluster")
    with KafkaCluster(directory, nodes=3, heap_mb=320, sasl=True, properties=rights) as it:
        yield it


@pytest.mark.timeout(420)  # a node of three goes and comes back
def test_results_that_too_few_replicas_take_wait_and_the_probes_say_for_what(
    cluster: KafkaCluster, tmp_path: Path, topic_name: Names
) -> None:
    kafka = cluster.bootstrap_servers
    streams = {delivery: stream_of(kafka, topic_name(delivery), delivery) for delivery in DELIVERIES}
    for stream in streams.values():
        configure(kafka, f"{stream.topic}.results", "min.insync.replicas", "3")
    with (
        App(tmp_path / "one", streams["at_least_once"].settings) as one,
        App(tmp_path / "two", streams["exactly_once"].settings) as two,
    ):
        apps = {"at_least_once": one, "exactly_once": two}
        for delivery, app in apps.items():
            app.until_ready()
            streams[delivery].produce(numbered(600))
            app.until(all_committed(streams[delivery]), "the first ones are done")
        cluster.kill(3)
        begun = {delivery: len(app.log().splitlines()) for delivery, app in apps.items()}
        for stream in streams.values():
            stream.produce(numbered(600, first=600))
        for delivery, app in apps.items():
            app.until(lambda _: "acknowledged nothing" in app.get("/readyz").text, "the probe says why")  # noqa: B023
            if delivery == "at_least_once":  # a transaction is given up in time, and its writes are forgotten
                assert f"{streams[delivery].topic}.results" in app.get("/readyz").text
            assert "acknowledged nothing" in app.get("/status").json()["tasks"]["main"]["reason"]
            assert app.get("/livez").status_code == 200

            def told(app: App = app, first: int = begun[delivery]) -> list[str]:
                return [line for line in app.log().splitlines()[first:] if '"level":"info"' not in line]

            # The client's lines are held back after the first, and no transaction gets as far as a refused write where
            # the one before it could not end: then it says what that one waits for.
            reasons = ["NotEnoughReplicas", *(["min.insync.replicas"] if delivery == "exactly_once" else [])]
            app.until(lambda _: any(it in line for line in told() for it in reasons), "the log says why")  # noqa: B023
            assert len(told()) < 20, told()
        cluster.restart(3)
        for delivery, app in apps.items():
            app.until(all_committed(streams[delivery]), "everything is done")
            app.until_ready()
            assert app.terminate() == 0
    for stream in streams.values():
        stream.check_complete()


@pytest.mark.parametrize("denied", ["results", "input", "group"])
def test_a_right_that_is_taken_away_stops_the_processor_with_what_to_grant(
    cluster: KafkaCluster, tmp_path: Path, topic_name: Names, denied: str
) -> None:
    stream = stream_of(cluster.bootstrap_servers, topic_name(denied))
    stream.settings["kafka"] |= {
        "bootstrap_servers": cluster.sasl_bootstrap_servers,
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "PLAIN",
        "sasl_username": SASL_USER,
        "sasl_password": SASL_PASSWORD,
    }
    resource, name, operation, told = {
        "results": (TOPIC, f"{stream.topic}.results", WRITE, f"Write on Topic {stream.topic}.results"),
        "input": (TOPIC, stream.topic, READ, f"Read on Topic {stream.topic} "),
        "group": (GROUP, f"{stream.topic}.main", READ, f"Read on Group {stream.topic}.main"),
    }[denied]
    with App(tmp_path, stream.settings) as app:
        app.until_ready()
        stream.produce(numbered(600))
        app.until(all_committed(stream), "the first ones are done")
        before = stream.committed()
        deny(cluster.bootstrap_servers, resource, name, operation)
        stream.produce(numbered(600, first=600))
        assert app.process.wait(60) == 1
    said = only_error(app)
    assert f"grant {SASL_USER} " in said
    assert told in said
    assert stream.topic in said
    assert denied != "results" or stream.committed() == before


def deny(kafka: str, resource: int, name: str, operation: int) -> None:
    """An ACL against the user of the SASL listener."""

    async def go() -> None:
        client = AIOKafkaAdminClient(bootstrap_servers=kafka)
        await client.start()
        try:
            literal, anybody, against = 3, "*", 2
            entry = (resource, name, literal, f"User:{SASL_USER}", anybody, operation, against)
            answer = await client._send_request(CreateAclsRequest(*entry))
            assert not answer.creation_responses[0][0], answer
        finally:
            await client.close()

    asyncio.run(go())


@pytest.mark.timeout(420)
def test_a_broker_that_is_away_costs_nothing_and_the_lag_is_true_throughout(
    kafka_available: None,  # noqa: ARG001
    tmp_path: Path,
) -> None:
    report = outage(tmp_path, nodes=1, seconds=4, rate=400)
    assert [it["node"] for it in report["aways"]] == [1]
    assert all("no connection to Kafka" in "".join(it["said"]) for it in report["aways"])


@pytest.mark.timeout(420)  # three nodes, each of which goes and comes back
def test_leaders_and_coordinators_that_move_cost_nothing(
    kafka_available: None,  # noqa: ARG001
    tmp_path: Path,
) -> None:
    report = outage(tmp_path, nodes=3, seconds=6, rate=300)
    assert [it["node"] for it in report["aways"]] == [1, 2, 3]


def outage(directory: Path, *, nodes: int, seconds: float, rate: float) -> dict[str, Any]:
    file = directory / "report.json"
    command = [sys.executable, "-m", "tests.chaos.outage", "--json", str(file), "--directory", str(directory / "run")]
    command += ["--nodes", str(nodes), "--seconds", str(seconds), "--rate", str(rate)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said, _ = process.communicate(timeout=400)
        finally:
            process.terminate()
    assert process.returncode == 0, said
    report: dict[str, Any] = json.loads(file.read_text())
    assert report["ok"]
    assert report["lost"] == report["duplicates"] == {"alo": 0, "eos": 0}
    assert all(it > 1_000 for it in report["records"].values())
    return report
