"""Kafka from its jars, as tests and `make kafka` use it: nodes start, stop, die and come back, and nothing stays."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaConnectionError

from deploy.kafka.kafka import (
    SASL_MECHANISMS,
    SASL_PASSWORD,
    SASL_USER,
    KafkaCluster,
    KafkaClusterError,
    free_ports,
    known_brokers,
)

Run = Callable[..., Any]
TopicName = Callable[..., str]
SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "kafka" / "kafka.py"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, **environment},
    )


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


async def create(servers: str, topic: str, replicas: int = 1) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        answer = await admin.create_topics([NewTopic(topic, 1, replicas)])
        assert answer.topic_errors[0][1] == 0, answer
    finally:
        await admin.close()


async def write(servers: str, topic: str, *values: bytes, **settings: Any) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=servers, enable_idempotence=True, **settings)
    try:
        await producer.start()
        for value in values:
            await producer.send_and_wait(topic, value)
    finally:
        await producer.stop()


async def read(servers: str, topic: str, count: int) -> list[bytes]:
    consumer = AIOKafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign([TopicPartition(topic, 0)])
        return [(await consumer.getone()).value for _ in range(count)]
    finally:
        await consumer.stop()


def test_the_shared_kafka_takes_idempotent_writes_and_gives_them_back(
    kafka: str, topic_name: TopicName, run: Run
) -> None:
    topic = topic_name()

    async def story() -> list[bytes]:
        await create(kafka, topic)
        await write(kafka, topic, b"1", b"2")
        return await read(kafka, topic, 2)

    assert run(story()) == [b"1", b"2"]


@pytest.mark.parametrize("mechanism", SASL_MECHANISMS)
def test_the_right_password_is_let_in_and_the_wrong_one_is_not(
    kafka: str, kafka_sasl: str, topic_name: TopicName, run: Run, mechanism: str
) -> None:
    topic = topic_name()
    login = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": mechanism, "sasl_plain_username": SASL_USER}

    async def story() -> None:
        await create(kafka, topic)
        await write(kafka_sasl, topic, b"in", sasl_plain_password=SASL_PASSWORD, **login)
        # aiokafka's clients tell why they cannot connect in their log alone.
        with pytest.raises(KafkaConnectionError):
            await write(kafka_sasl, topic, b"not in", sasl_plain_password=SASL_PASSWORD[::-1], **login)
        assert await read(kafka, topic, 1) == [b"in"]

    run(story())


@pytest.mark.usefixtures("kafka_available")
def test_what_was_written_survives_a_killed_node_and_a_stop_that_keeps_it(
    tmp_path: Path, topic_name: TopicName, run: Run
) -> None:
    topic = topic_name()
    with KafkaCluster(tmp_path / "kafka", properties={"message.max.bytes": "3000000"}) as cluster:
        run(create(cluster.bootstrap_servers, topic))
        run(write(cluster.bootstrap_servers, topic, b"x" * 2_000_000, max_request_size=3_000_000))
        cluster.kill(1)
        assert cluster.running() == []
        cluster.restart(1)
        run(write(cluster.bootstrap_servers, topic, b"after the kill"))
        cluster.stop(keep=True)
        cluster.start()
        assert run(read(cluster.bootstrap_servers, topic, 2)) == [b"x" * 2_000_000, b"after the kill"]
    assert list((tmp_path / "kafka").iterdir()) == []


@pytest.mark.usefixtures("kafka_available")
def test_three_nodes_go_on_with_two_and_take_the_third_back(tmp_path: Path, topic_name: TopicName, run: Run) -> None:
    topic = topic_name()
    with KafkaCluster(tmp_path / "kafka", nodes=3, heap_mb=320) as cluster:
        assert cluster.answering() == [1, 2, 3]
        run(create(cluster.bootstrap_servers, topic, replicas=3))
        run(write(cluster.bootstrap_servers, topic, b"three"))
        cluster.kill(2)
        run(write(cluster.bootstrap_servers, topic, b"two"), timeout_s=90)
        assert cluster.running() == [1, 3]
        cluster.restart(2)
        assert cluster.answering() == [1, 2, 3]
        assert run(read(cluster.bootstrap_servers, topic, 2)) == [b"three", b"two"]


@pytest.mark.usefixtures("kafka_available")
def test_whoever_asks_at_an_extra_listener_is_sent_to_the_port_that_it_advertises(
    tmp_path: Path, topic_name: TopicName, run: Run
) -> None:
    topic, through, nowhere = topic_name(), free_ports(1)[0], free_ports(1)[0]
    cluster = KafkaCluster(tmp_path / "kafka", extra_listeners={"R1": {1: through}, "R2": {1: nowhere}})

    async def story() -> list[bytes]:
        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", cluster.extra_ports["R1"][1])

            async def carry(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
                while data := await source.read(65_536):
                    to.write(data)
                to.close()

            try:
                await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer))
            finally:
                far_writer.close()
                writer.close()

        server = await asyncio.start_server(forward, "127.0.0.1", through)
        # Asked at the node itself, and led from there to the port before it; at R2 it would lead nowhere.
        asked = f"127.0.0.1:{cluster.extra_ports['R1'][1]}"
        await create(cluster.bootstrap_servers, topic)
        await write(asked, topic, b"1", b"2")
        found = await read(asked, topic, 2)
        server.close()
        with pytest.raises(KafkaConnectionError):
            await write(f"127.0.0.1:{nowhere}", topic, b"3")
        return found

    with cluster:
        loaded = KafkaCluster.load(tmp_path / "kafka")
        assert loaded is not None
        assert (loaded.extra_listeners, loaded.extra_ports) == (cluster.extra_listeners, cluster.extra_ports)
        assert run(story()) == [b"1", b"2"]


def test_an_extra_listener_advertises_a_port_for_each_node(tmp_path: Path) -> None:
    with pytest.raises(KafkaClusterError, match="each of the nodes 1 to 3"):
        KafkaCluster(tmp_path, nodes=3, extra_listeners={"R1": {1: 7_001, 2: 7_002}})


@pytest.mark.usefixtures("kafka_available")
def test_a_wrong_property_is_told_with_what_kafka_said_of_it(tmp_path: Path) -> None:
    with pytest.raises(KafkaClusterError, match=r"(?s)property.*message\.max\.bytes"):
        KafkaCluster(tmp_path / "kafka", properties={"message.max.bytes": "many"}).start()


@pytest.mark.usefixtures("kafka_available")
def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(KafkaClusterError, match=f"Port {port} is in use"):
            KafkaCluster(tmp_path / "kafka", ports=[port]).start()


@pytest.mark.usefixtures("kafka_available")
def test_a_port_that_is_taken_while_it_starts_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = KafkaCluster(tmp_path / "kafka")
    port = int(cluster.bootstrap_servers.rpartition(":")[2])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        monkeypatch.setattr(cluster, "_check_ports", lambda: None)
        with pytest.raises(
            KafkaClusterError, match=f"ended while it started.*\n(.*\n)*.*127.0.0.1:{port}: Address already"
        ):
            cluster.start()


def test_ports_that_one_process_was_given_no_other_gets_while_it_lives() -> None:
    asking = (
        "from deploy.kafka.kafka import free_ports; print(*free_ports(2_500), *free_ports(2_500), flush=True); input()"
    )
    ours, theirs = (
        subprocess.Popen(
            [sys.executable, "-c", asking],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=SCRIPT.parents[2],
        )
        for _ in range(2)
    )
    with ours, theirs:
        assert ours.stdout is not None
        assert theirs.stdout is not None
        given = [*ours.stdout.readline().split(), *theirs.stdout.readline().split()]
        assert len(given) == len(set(given)) == 10_000
        ours.kill()
        theirs.kill()


@pytest.mark.usefixtures("kafka_available")
def test_up_leaves_it_running_and_down_ends_it(tmp_path: Path) -> None:
    port, there = free_ports(1)[0], ("--dir", str(tmp_path / "kafka"))
    try:
        up = command("up", *there, "--port", str(port))
        assert (up.returncode, f"127.0.0.1:{port}" in up.stdout) == (0, True), up.stderr
        again = command("up", *there, "--port", str(port))
        assert (again.returncode, "runs already" in again.stdout) == (0, True), again.stderr
        other = command("up", *there, "--port", str(port), "--property", "message.max.bytes=5")
        assert (other.returncode, "other settings" in other.stderr) == (1, True), other.stdout
        assert command("status", *there).returncode == 0
        assert known_brokers("127.0.0.1", port) == {1}
    finally:
        down = command("down", *there)
    assert down.returncode == 0, down.stderr
    assert known_brokers("127.0.0.1", port) == set()
    assert list((tmp_path / "kafka").iterdir()) == []
    assert command("status", *there).returncode == 1


@pytest.mark.usefixtures("kafka_available")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_in_the_foreground_it_ends_with_its_command(tmp_path: Path, number: signal.Signals) -> None:
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells a process of its parent's death")
    port, folder = free_ports(1)[0], tmp_path / "kafka"
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "run", "--dir", str(folder), "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert f"127.0.0.1:{port}" in process.stdout.readline()
            assert KafkaCluster.load(folder) is not None
            process.send_signal(number)
            code = process.wait(timeout=60)
        finally:
            process.kill()
    assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    assert until(lambda: not known_brokers("127.0.0.1", port))
    assert command("down", "--dir", str(folder)).returncode == 0


def test_down_is_fine_when_nothing_is_there(tmp_path: Path) -> None:
    down = command("down", "--dir", str(tmp_path / "kafka"))
    assert (down.returncode, down.stderr) == (0, "")


def test_a_foreign_process_that_has_a_nodes_old_id_is_left_alone(tmp_path: Path) -> None:
    cluster = KafkaCluster(tmp_path)
    (tmp_path / "node-1").mkdir()
    (tmp_path / "node-1" / "pid").write_text(str(os.getpid()), encoding="utf-8")
    assert cluster.pid(1) is None
    cluster.stop()  # and this test is still there to say so


def test_without_java_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    up = command("up", "--dir", str(tmp_path / "kafka"), PATH=str(tmp_path), JAVA_HOME="")
    assert up.returncode == 1
    assert up.stderr.splitlines() == [
        "kafka.py: Kafka needs Java, and there is none: install Java 17 or set JAVA_HOME."
    ]
