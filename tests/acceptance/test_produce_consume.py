"""``produce``, ``consume``, ``topics``, ``lag`` and ``broker`` as a user meets them: processes, files and pipes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.interface import NewTopic
from streamproc.broker.reader import KafkaReader
from streamproc.cli.lag import PartitionLag, measure
from streamproc.records import TopicPartition
from streamproc.settings import KafkaSettings, Settings
from tests.conftest import Run, TopicName
from tests.support.commands import clean_environment

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "streamproc"]

Streamproc = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environ(embedded_broker: str) -> dict[str, str]:
    return {**clean_environment(), "STREAMPROC_KAFKA__BOOTSTRAP_SERVERS": embedded_broker}


@pytest.fixture
def streamproc(tmp_path: Path, environ: dict[str, str]) -> Streamproc:
    def run(*arguments: str, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*COMMAND, *arguments],
            cwd=tmp_path,
            env=environ,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def create(run: Run, embedded_broker: str) -> Callable[[str, int], None]:
    def create(topic: str, partitions: int) -> None:
        async def go() -> None:
            async with KafkaAdmin(KafkaSettings(bootstrap_servers=embedded_broker)) as admin:
                await admin.create_topics([NewTopic(topic, partitions)])

        run(go())

    return create


@pytest.fixture
def topic(topic_name: TopicName, create: Callable[[str, int], None]) -> str:
    name = topic_name()
    create(name, 3)
    return name


def _lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def _read(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def test_what_is_produced_is_consumed(streamproc: Streamproc, topic: str, tmp_path: Path) -> None:
    records = [{"id": n, "text": "ä\n"} for n in range(1_000)]
    (tmp_path / "records.jsonl").write_text(_lines(*records))
    written = streamproc("produce", topic, "records.jsonl")
    assert "wrote 1,000 records" in written.stderr
    assert written.stdout == ""
    back = _read(streamproc("consume", topic).stdout)
    assert sorted(back, key=lambda record: record["id"]) == records


def test_standard_input_and_count_and_position(streamproc: Streamproc, topic: str) -> None:
    streamproc("produce", topic, "-", "--partition", "1", stdin=_lines(*range(10)))
    assert _read(streamproc("consume", topic, "-n", "3").stdout) == [0, 1, 2]
    assert _read(streamproc("consume", topic, "--from", "7").stdout) == [7, 8, 9]
    assert _read(streamproc("consume", topic, "--from", "-2").stdout) == [8, 9]
    assert _read(streamproc("consume", topic, "--from", "1h", "--partition", "1").stdout) == list(range(10))
    assert streamproc("consume", topic, "--from", "end").stdout == ""
    assert streamproc("consume", topic, "--partition", "0").stdout == ""


def test_a_key_field_decides_the_partition(streamproc: Streamproc, topic: str) -> None:
    streamproc("produce", topic, "--key", "user", stdin=_lines(*({"user": f"u{n % 20}", "n": n} for n in range(200))))
    records = _read(streamproc("consume", topic, "--full").stdout)
    partitions: dict[str, set[int]] = {}
    for record in records:
        partitions.setdefault(record["key"], set()).add(record["partition"])
    assert len(partitions) == 20
    assert all(len(found) == 1 for found in partitions.values())
    assert len(set().union(*partitions.values())) == 3
    for key in partitions:
        order = [record["value"]["n"] for record in records if record["key"] == key]
        assert order == sorted(order)


def test_records_without_a_key_are_spread_also_where_they_are_few(
    streamproc: Streamproc, topic_name: TopicName, create: Callable[[str, int], None]
) -> None:
    name = topic_name()
    create(name, 4)
    streamproc("produce", name, stdin=_lines(*range(20)))
    for number in range(4):
        found = _read(streamproc("consume", name, "--partition", str(number)).stdout)
        assert len(found) == 5
        assert found == sorted(found)


def test_full_lines_carry_key_headers_timestamp_and_any_bytes(
    streamproc: Streamproc, topic: str, topic_name: TopicName, create: Callable[[str, int], None]
) -> None:
    copy = topic_name("copy")
    create(copy, 3)
    line = {
        "key": {"$base64": "/wA="},
        "headers": [["a", "1"], ["a", None], ["b", {"$base64": "gA=="}]],
        "timestamp": 1_600_000_000_000,
    }
    values = [{"x": 1}, None, {"$text": "plain"}, {"$base64": "gIE="}]
    streamproc("produce", topic, "--full", stdin=_lines(*({**line, "value": value} for value in values)))
    first = streamproc("consume", topic, "--full").stdout
    streamproc("produce", copy, "--full", stdin=first)
    second = streamproc("consume", copy, "--full").stdout
    for found in (_read(first), _read(second)):
        assert [record["value"] for record in found] == values
        assert all({name: record[name] for name in line} == line for record in found)


def test_raw_lines_are_written_as_they_are(streamproc: Streamproc, topic: str) -> None:
    streamproc("produce", topic, "--raw", "--partition", "0", stdin='not json\n{"a": 1}\n')
    assert _read(streamproc("consume", topic).stdout) == [{"$text": "not json"}, {"a": 1}]


def test_a_bad_line_is_named_and_what_came_before_it_is_written(
    streamproc: Streamproc, topic: str, tmp_path: Path
) -> None:
    (tmp_path / "records.jsonl").write_text('{"a": 1}\n\n{"secret": \n{"a": 2}\n')
    failed = streamproc("produce", topic, "records.jsonl", code=1)
    assert "records.jsonl:3: the line is not JSON" in failed.stderr
    assert "secret" not in failed.stderr
    assert _read(streamproc("consume", topic).stdout) == [{"a": 1}]


def test_a_rate_is_kept(streamproc: Streamproc, topic: str) -> None:
    begun = time.monotonic()
    streamproc("produce", topic, "--rate", "100", stdin=_lines(*range(100)))
    assert time.monotonic() - begun >= 0.9
    assert len(_read(streamproc("consume", topic).stdout)) == 100


def test_following_sees_records_as_they_come(streamproc: Streamproc, topic: str, environ: dict[str, str]) -> None:
    command = [*COMMAND, "consume", topic, "--follow"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        try:
            assert follower.stdout is not None
            streamproc("produce", topic, stdin=_lines("first"))
            assert json.loads(follower.stdout.readline()) == "first"
            streamproc("produce", topic, stdin=_lines("second"))
            assert json.loads(follower.stdout.readline()) == "second"
            follower.send_signal(signal.SIGINT)
            _, err = follower.communicate(timeout=20)
            assert (follower.returncode, err) == (130, "")
        finally:
            follower.kill()


def test_an_input_that_pauses_holds_nothing_back(streamproc: Streamproc, topic: str, environ: dict[str, str]) -> None:
    with subprocess.Popen(
        [*COMMAND, "produce", topic, "-q"], env=environ, stdin=subprocess.PIPE, text=True
    ) as producer:
        try:
            assert producer.stdin is not None
            producer.stdin.write(_lines("now"))
            producer.stdin.flush()
            seen = streamproc("consume", topic, "--follow", "-n", "1", "--timeout", "20")
            assert _read(seen.stdout) == ["now"]
            assert producer.poll() is None
            producer.stdin.close()
            assert producer.wait(20) == 0
        finally:
            producer.kill()


def test_who_interrupts_is_told_what_was_written(streamproc: Streamproc, topic: str, environ: dict[str, str]) -> None:
    with subprocess.Popen(
        [*COMMAND, "produce", topic, "--json"],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as producer:
        try:
            assert producer.stdin is not None
            producer.stdin.write(_lines(1, 2, 3))
            producer.stdin.flush()
            streamproc("consume", topic, "--follow", "-n", "3", "--timeout", "20")
            producer.send_signal(signal.SIGINT)
            out, err = producer.communicate(timeout=20)
            assert producer.returncode == 130
            assert json.loads(out)["records"] == 3
            assert err.splitlines()[-1] == "interrupted; 3 records written and acknowledged"
        finally:
            producer.kill()


def test_a_script_gets_the_total_as_json(streamproc: Streamproc, topic: str) -> None:
    total = json.loads(streamproc("produce", topic, "--json", "-q", stdin=_lines(1, 2)).stdout)
    assert (total["topic"], total["records"]) == (topic, 2)
    assert total["seconds"] == round(total["seconds"], 3)


def test_produce_says_nothing_of_what_does_not_concern_it(streamproc: Streamproc, topic: str) -> None:
    """That the embedded broker has no idempotent producers, for one."""
    err = streamproc("produce", topic, stdin=_lines(1)).stderr
    assert err.startswith("wrote 1 record in ")
    assert err.count("\n") == 1


def test_too_few_records_in_time_is_a_failure(streamproc: Streamproc, topic: str) -> None:
    streamproc("produce", topic, stdin=_lines(1))
    done = streamproc("consume", topic, "--follow", "-n", "2", "--timeout", "0.5", code=1)
    assert _read(done.stdout) == [1]
    assert "1 of 2 records" in done.stderr


def test_topics_that_do_not_exist_are_named(streamproc: Streamproc, topic_name: TopicName) -> None:
    name = topic_name()
    assert name in streamproc("produce", name, stdin="1\n", code=1).stderr
    assert name in streamproc("consume", name, code=1).stderr
    assert name in streamproc("consume", name, code=1).stderr, "asking must not create it"


def test_the_topic_that_was_meant_is_named(streamproc: Streamproc, topic: str) -> None:
    for command in ("produce", "consume"):
        err = streamproc(command, f"{topic[:-1]}x", stdin="1\n", code=1).stderr
        assert f"did you mean {topic}" in err
        assert "`streamproc topics apply`" in err


@pytest.mark.parametrize("command", [("produce", "any"), ("consume", "any"), ("topics", "plan")])
def test_an_address_without_a_port_is_refused(streamproc: Streamproc, command: tuple[str, ...]) -> None:
    err = streamproc(*command, "-b", "localhost", code=2).stderr
    assert err.startswith(
        "--bootstrap-servers: kafka.bootstrap_servers: 'localhost' is no address of the form host:port"
    )


def test_why_a_topic_cannot_be_deleted_is_told(streamproc: Streamproc, topic: str, tmp_path: Path) -> None:
    (tmp_path / "topics").mkdir()
    (tmp_path / "topics" / "one.yaml").write_text("topic: declared\n")
    (tmp_path / "streamproc.yaml").write_text(
        "name: app\nbackend: {path: m:B}\ntasks: {text: {input: {topics: [declared]}}}\n"
    )

    def told(name: str) -> str:
        return streamproc("topics", "plan", "--delete", name, code=1).stderr

    assert "cannot delete declared (it is declared in" in told("declared")
    assert "the settings use it: results of task text" in told("declared.results")
    assert f"there is no such topic: did you mean {topic}?" in told(f"{topic}x")


def test_a_partition_that_does_not_exist_is_refused(streamproc: Streamproc, topic: str) -> None:
    assert "0 to 2" in streamproc("produce", topic, "--partition", "3", stdin="1\n", code=2).stderr
    assert "0 to 2" in streamproc("consume", topic, "--partition", "3", code=2).stderr


def test_without_settings_and_address_the_sentence_says_what_to_give(
    streamproc: Streamproc, environ: dict[str, str]
) -> None:
    del environ["STREAMPROC_KAFKA__BOOTSTRAP_SERVERS"]
    assert "--bootstrap-servers" in streamproc("consume", "any", code=2).stderr


def test_declared_topics_are_planned_and_applied(streamproc: Streamproc, topic_name: TopicName, tmp_path: Path) -> None:
    name = topic_name()
    folder = tmp_path / "topics"
    folder.mkdir()
    (folder / "one.yaml").write_text(f"topic: {name}\npartitions: 2\n")
    planned = streamproc("topics", "plan", "--exit-code", "--json", code=3)
    assert [change["topic"] for change in json.loads(planned.stdout)["changes"]] == [name]
    assert "--yes" in streamproc("topics", "apply", code=2).stderr
    assert "1 change made" in streamproc("topics", "apply", "--yes").stderr
    assert json.loads(streamproc("topics", "plan", "--exit-code", "--json").stdout) == {"empty": True, "changes": []}
    (folder / "one.yaml").unlink()
    (folder / "two.yaml").write_text(f"topic: {topic_name('other')}\n")
    refused = streamproc("topics", "apply", "--yes", "--delete", name, code=1)
    assert "--allow-destructive" in refused.stderr
    streamproc("topics", "apply", "--yes", "--delete", name, "--allow-destructive")
    assert "cannot delete" in streamproc("topics", "plan", "--delete", name, code=1).stderr


def _settings(broker: str, topic: str, reset: str = "earliest") -> Settings:
    return Settings.model_validate(
        {
            "name": f"lag-{topic}",
            "kafka": {"bootstrap_servers": broker},
            "backend": {"path": "m:B"},
            "tasks": {"text": {"input": {"topics": [topic], "auto_offset_reset": reset}}},
        }
    )


def test_lag_is_in_records_and_in_seconds(
    streamproc: Streamproc, topic: str, embedded_broker: str, run: Run, tmp_path: Path
) -> None:
    lines = [{"value": n, "timestamp": 1_600_000_000_000 + n * 1_000} for n in range(5)]
    streamproc("produce", topic, "--full", "--partition", "1", stdin=_lines(*lines))

    async def lags(reset: str) -> list[PartitionLag]:
        settings = _settings(embedded_broker, topic, reset)
        async with KafkaAdmin(settings.kafka) as admin, KafkaReader(settings.kafka) as reader:
            return await measure(settings, admin, reader, 1_600_000_010.0)

    found = run(lags("earliest"))
    assert [(it.partition, it.records, it.seconds) for it in found] == [(0, 0, 0.0), (1, 5, 10.0), (2, 0, 0.0)]
    assert found[1].committed is None
    assert {it.records for it in run(lags("latest"))} == {0}

    (tmp_path / "streamproc.yaml").write_text(
        f"name: app\nbackend: {{path: m:B}}\ntasks: {{text: {{input: {{topics: [{topic}]}}}}}}\n"
    )
    shown = json.loads(streamproc("lag", "--json").stdout)
    assert [it["records"] for it in shown] == [0, 5, 0]
    assert "lag (records)" in streamproc("lag").stdout


def test_a_committed_offset_is_where_lag_counts_from(
    streamproc: Streamproc, topic: str, embedded_broker: str, run: Run
) -> None:
    lines = [{"value": n, "timestamp": 1_600_000_000_000 + n * 1_000} for n in range(5)]
    streamproc("produce", topic, "--full", "--partition", "1", stdin=_lines(*lines))
    settings = _settings(embedded_broker, topic)

    async def commit() -> None:
        from streamproc.broker.consumer import KafkaConsumer

        async def nothing(_: set[TopicPartition]) -> None: ...

        consumer = KafkaConsumer(settings.kafka, group_id=settings.group_of("text"), client_id="test")
        await consumer.start([topic], nothing, nothing)
        seen = 0
        while seen < 5:
            seen += sum(len(it) for it in (await consumer.getmany(timeout_ms=500, max_records=100)).values())
        await consumer.commit({TopicPartition(topic, 1): 3})
        await consumer.stop()

    async def lags() -> list[PartitionLag]:
        async with KafkaAdmin(settings.kafka) as admin, KafkaReader(settings.kafka) as reader:
            return await measure(settings, admin, reader, 1_600_000_010.0)

    run(commit())
    found = run(lags())
    assert (found[1].committed, found[1].records, found[1].seconds) == (3, 2, 7.0)


def test_the_broker_in_the_foreground_stops_when_told(environ: dict[str, str]) -> None:
    command = [*COMMAND, "broker", "--port", "0"]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as broker:
        try:
            assert broker.stderr is not None
            said = broker.stderr.readline()
            assert said.startswith("embedded broker at 127.0.0.1:")
            broker.send_signal(signal.SIGTERM)
            assert broker.wait(20) == 0
        finally:
            broker.kill()
