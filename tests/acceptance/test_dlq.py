"""``streamproc dlq`` as a user runs it: a broken backend's dead letters, looked at, sent back, interrupted, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamproc.replay import marks
from tests.support.app import ROOT, App, committed, create, ends, produce, read_to_end
from tests.support.asyncs import wait_until

PARTITIONS = 3
RECORDS = 1_000
Names = Callable[..., str]


class Stream:
    """A task whose backend is broken until it is mended."""

    def __init__(
        self, bootstrap_servers: str, name: str, tmp_path: Path, configs: dict[str, str] | None = None, **task: Any
    ) -> None:
        self.kafka, self.topic, self.tmp_path = bootstrap_servers, name, tmp_path
        self.mended = tmp_path / "mended"
        create(bootstrap_servers, {name: PARTITIONS}, **(configs or {}))
        create(
            bootstrap_servers,
            {f"{name}.results": PARTITIONS, f"{name}.dead": PARTITIONS, f"{name}.metrics": 1},
        )
        self.settings = {
            "name": name,
            "kafka": {"bootstrap_servers": bootstrap_servers},
            "backend": {"path": "tests.support.backends:Scripted", "base_dir": str(ROOT)},
            "tasks": {
                "main": {
                    "input": {"topics": [name]},
                    "commit_interval_ms": 50,
                    "on_error": {"retries": 0, "circuit": {"enabled": False}},
                    **task,
                }
            },
        }

    def produce(self, count: int) -> None:
        rows: dict[int, list[tuple[bytes | None, bytes | None]]] = {partition: [] for partition in range(PARTITIONS)}
        for number in range(count):
            value = json.dumps({"id": number, "do": "fail", "until": str(self.mended)}).encode()
            rows[number % PARTITIONS].append((b"k%d" % number, value))
        produce(self.kafka, self.topic, rows)

    def process(self) -> None:
        """Run the processor until it has done all that there is."""
        with App(self.tmp_path / "app", self.settings) as app:
            self.settle(app)
            assert app.terminate() == 0

    def settle(self, app: App) -> None:
        """Wait until everything that there is now is committed."""
        # Not to the log's ends: behind the records that a redrive wrote is the marker of its transaction.
        done = {it.partition: it.offset + 1 for it in read_to_end(self.kafka, self.topic, PARTITIONS)}
        app.until(
            lambda _: committed(self.kafka, f"{self.topic}.main", self.topic, PARTITIONS) == done,
            "everything is committed",
        )

    def dlq(self, *arguments: str) -> subprocess.Popen[str]:
        """Begin a command; it reads the settings that the processor runs with."""
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "streamproc",
                "dlq",
                *arguments,
                "-c",
                str(self.tmp_path / "app" / "streamproc.yaml"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "400"},
        )

    def run(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """A command to its end: standard output and error."""
        with self.dlq(*arguments) as process:
            try:
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == code, f"{process.returncode}: {err}"
        assert "Traceback" not in err
        return out, err

    def sent_back(self) -> int:
        return sum(marks.count_of(it.headers) > 0 for it in read_to_end(self.kafka, self.topic, PARTITIONS))

    def results(self) -> Counter[int]:
        found = read_to_end(self.kafka, f"{self.topic}.results", PARTITIONS)
        return Counter(json.loads(it.value or b"")["result"]["id"] for it in found)


def test_a_thousand_dead_letters_are_sent_back_once_each_though_it_is_killed_and_interrupted(
    kafka: str, tmp_path: Path, topic_name: Names
) -> None:
    stream = Stream(kafka, topic_name(), tmp_path)
    stream.produce(RECORDS)
    stream.process()
    assert stream.results() == Counter()
    assert len(read_to_end(kafka, f"{stream.topic}.dead", PARTITIONS)) == RECORDS
    stream.mended.touch()

    out, err = stream.run("redrive", "--dry-run")
    assert f"{RECORDS:,} dead letters would be sent" in err
    assert sum(int(line.split()[-1].replace(",", "")) for line in out.splitlines()[1:]) == RECORDS
    assert stream.sent_back() == 0
    assert committed(kafka, f"{stream.topic}.{stream.topic}.dead.redrive", f"{stream.topic}.dead", PARTITIONS) == {}

    # At this rate a transaction of 62 is committed every quarter of a second.
    before = 0
    for kill in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        with stream.dlq("redrive", "main", "--yes", "--rate", "250") as process:
            try:
                wait_until(lambda: stream.sent_back() > before, "some are sent back")  # noqa: B023
                assert process.poll() is None, "it is in the middle"
                process.send_signal(kill)
                _, err = process.communicate(timeout=30)
            finally:
                process.kill()
        before = stream.sent_back()
        assert before < RECORDS
        if kill == signal.SIGINT:
            assert process.returncode == 130
            assert "dead letters sent back, and interrupted; the same command goes on" in err
    begun = time.monotonic()
    told = json.loads(stream.run("redrive", "main", "--yes", "--json")[0])
    assert time.monotonic() - begun < 30, "what the killed one left open is ended at once"
    assert told["sent"] == RECORDS - before
    assert (told["delivery"], told["skipped"], told["not_selected"]) == ("exactly_once", {}, 0)
    assert json.loads(stream.run("redrive", "--yes", "--json")[0])["sent"] == 0

    stream.process()
    assert stream.results() == Counter(range(RECORDS))
    again = [it for it in read_to_end(kafka, stream.topic, PARTITIONS) if marks.count_of(it.headers)]
    assert all(json.loads(it.value or b"")["id"] % PARTITIONS == it.partition for it in again)
    assert {marks.count_of(it.headers) for it in read_to_end(kafka, f"{stream.topic}.results", PARTITIONS)} == {1}


def test_records_that_are_too_old_for_their_topic_are_warned_of(
    embedded_broker: str, tmp_path: Path, topic_name: Names
) -> None:
    stream = Stream(embedded_broker, topic_name(), tmp_path, {"retention.ms": "172800000"})
    produce(embedded_broker, stream.topic, {0: [(None, b"{")]}, timestamp=1_600_000_000_000)
    stream.process()
    warning = "keeps records for 2 days (retention.ms), and some are older"
    assert warning in stream.run("redrive", "--dry-run")[1]
    assert warning not in stream.run("redrive", "--dry-run", "--timestamps", "now")[1]
    assert stream.run("redrive", "--yes")[1].count(warning) == 1


def test_letters_of_an_exactly_once_task_are_sent_back_once_each(kafka: str, tmp_path: Path, topic_name: Names) -> None:
    """Their topic has the markers of transactions between and behind them."""
    stream = Stream(kafka, topic_name(), tmp_path, delivery="exactly_once")
    stream.produce(90)
    stream.process()
    stream.mended.touch()
    assert json.loads(stream.run("redrive", "--yes", "--json", "--limit", "40")[0])["sent"] == 40
    assert json.loads(stream.run("redrive", "--yes", "--json")[0])["sent"] == 50
    stream.process()
    assert stream.results() == Counter(range(90))


@pytest.mark.parametrize("world", ["embedded_broker", pytest.param("kafka", marks=pytest.mark.kafka)])
def test_dead_letters_are_listed_shown_and_sent_back_until_the_guard_against_loops(
    world: str, request: pytest.FixtureRequest, tmp_path: Path, topic_name: Names
) -> None:
    stream = Stream(request.getfixturevalue(world), topic_name(), tmp_path)
    dead = f"{stream.topic}.dead"
    stream.produce(6)
    rows: list[tuple[bytes | None, bytes | None]] = [(None, b"{"), (None, b"\xff\x00\x1b[31m")]
    produce(stream.kafka, stream.topic, {0: rows})
    stream.process()

    told = json.loads(stream.run("list", "--json")[0])
    assert told["letters"] == 8
    faults = {it["cause"]: it for it in told["faults"]}
    assert set(faults) == {"exception", "invalid"}
    assert (faults["exception"]["count"], faults["exception"]["error_type"]) == (6, "ValueError")
    table, err = stream.run("list", "main", "--from", "1h")
    assert f"8 dead letters in {dead}" in err
    assert faults["exception"]["fault"] in table
    assert "8 dead letters" in stream.run("list", dead, "-b", stream.kafka)[1]
    assert "0 dead letters" in stream.run("list", "--from", "end")[1]

    example = faults["exception"]["example"]
    place = f"{dead}:{example['partition']}:{example['offset']}"
    shown = stream.run("show", place)[0]
    assert "ValueError: the model is broken" in shown
    assert '"do": "fail"' in shown
    as_json = json.loads(stream.run("show", *place.split(":"), "--json")[0])
    assert as_json["value"]["id"] == int(as_json["key"].removeprefix("k"))
    assert as_json["traceback"].endswith("ValueError: the model is broken")
    source = as_json["source"]
    by_source = stream.run("show", "--source", f"{stream.topic}:{source['partition']}:{source['offset']}", "--json")[0]
    assert json.loads(by_source) == as_json
    garbage = next(it for it in read_to_end(stream.kafka, dead, PARTITIONS) if it.value == rows[1][1])
    shown = stream.run("show", f"{dead}:{garbage.partition}:{garbage.offset}")[0]
    assert "ff 00 1b 5b 33 31 6d" in shown
    assert "\x1b" not in shown

    with App(tmp_path / "app", stream.settings) as app:
        for turn in (1, 2, 3):
            told = json.loads(stream.run("redrive", "--fault", faults["exception"]["fault"], "--yes", "--json")[0])
            assert (told["sent"], told["not_selected"]) == (6, 2 if turn == 1 else 0)
            stream.settle(app)
            letters = [it for it in read_to_end(stream.kafka, dead, PARTITIONS) if marks.count_of(it.headers) == turn]
            assert len(letters) == 6, "the count goes with the record into its next dead letter"
            assert all([name for name, _ in it.headers].count("streamproc-cause") == 1 for it in letters)
        before = ends(stream.kafka, stream.topic, PARTITIONS)
        chosen = ("--cause", "exception", "--message", "broken", "--replayed", "3")
        _, err = stream.run("redrive", *chosen, "--yes", code=1)
        assert "skipped: 6 were sent back as often as --max-replays allows" in err
        assert ends(stream.kafka, stream.topic, PARTITIONS) == before

        stream.mended.touch()
        stream.run("redrive", *chosen, "--max-replays", "4", "--group", f"{stream.topic}-again", "--yes")
        stream.settle(app)
        assert app.terminate() == 0
    assert stream.results() == Counter(range(6))


def test_what_cannot_be_found_is_one_sentence(embedded_broker: str, tmp_path: Path, topic_name: Names) -> None:
    stream = Stream(embedded_broker, topic_name(), tmp_path)
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "streamproc.yaml").write_text(json.dumps(stream.settings))
    dead = f"{stream.topic}.dead"
    for arguments, code, sentence in (
        (["list", "nothing"], 1, "topic nothing does not exist"),
        (["show", dead], 2, "write it as TOPIC:PARTITION:OFFSET"),
        (["show", f"{dead}:9:0"], 2, f"topic {dead} has no partition 9"),
        (["show", f"{dead}:0:7"], 1, f"there is no record at {dead}:0:7; partition 0 is empty"),
        (["show", "--source", f"{stream.topic}:0:0"], 1, f"there is no dead letter of {stream.topic}:0:0 in {dead}"),
        (["redrive", "--message", "/(/"], 2, "is no regular expression"),
        (["redrive", "--where", "x"], 2, "--where x is no FIELD=VALUE"),
        (["redrive", "--to", "never"], 2, "--to never is neither"),
    ):
        out, err = stream.run(*arguments, code=code)
        assert out == ""
        assert sentence in " ".join(err.split()), err
    assert "0 dead letters to be sent" in stream.run("redrive")[1], "it does not ask where there is nothing"
    produce(embedded_broker, stream.topic, {0: [(None, b"{")]})
    stream.process()
    assert "nothing was sent: there is nobody to ask; give --yes" in stream.run("redrive", code=2)[1]
