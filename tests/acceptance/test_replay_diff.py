"""``replay diff`` and ``replay shadow`` as a user meets them: two versions of a model, files, topics and exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamproc.broker.memory_log import MemoryRecord
from streamproc.record_lines import write_full
from streamproc.replay.marks import Source, mark
from tests.conftest import TopicName
from tests.support.app import App, committed, create, ends, produce, read_to_end
from tests.support.asyncs import wait_until
from tests.support.commands import clean_environment

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "streamproc"]
PARTITIONS = 3
RECORDS = 300

MODELS = """
from streamproc import InferenceBackend, RecordError

class Old(InferenceBackend):
    def execute(self, inputs):
        return [self.judge(it["id"]) for it in inputs]

    def judge(self, number):
        return {"id": number, "label": "even" if number % 2 == 0 else "odd", "score": number / 7}

class New(Old):
    def judge(self, number):
        if number % 50 == 3:
            return RecordError("too odd")
        renamed = {"label": "EVEN"} if number % 10 == 0 else {}
        return {**super().judge(number), **renamed}
"""
RENAMED = [it for it in range(RECORDS) if it % 10 == 0]
REFUSED = [it for it in range(RECORDS) if it % 50 == 3]

Streamproc = Callable[..., "subprocess.CompletedProcess[str]"]


def environ() -> dict[str, str]:
    return {**clean_environment(), "COLUMNS": "120"}


@pytest.fixture
def streamproc(tmp_path: Path) -> Streamproc:
    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*COMMAND, *arguments],
            cwd=tmp_path,
            env=environ(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


class Application:
    """An application with topics of its own on Kafka, its settings beside the models."""

    def __init__(self, folder: Path, kafka: str, name: str, backend: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "models.py").write_text(MODELS)
        self.kafka = kafka
        self.name = name
        self.folder = folder
        self.settings: dict[str, Any] = {
            "name": name,
            "kafka": {"bootstrap_servers": kafka},
            "backend": {"path": f"models:{backend}"},
            "http": {"port": 0},
            "tasks": {"main": {"input": {"topics": [name]}, "batch": {"max_size": 32}}},
        }
        self.file = folder / "streamproc.yaml"
        self.file.write_text(yaml.safe_dump(self.settings))
        create(kafka, {name: PARTITIONS, f"{name}.results": PARTITIONS, f"{name}.dead": PARTITIONS})
        create(kafka, {f"{name}.metrics": 1})

    def produce(self, numbers: Sequence[int]) -> None:
        rows: dict[int, list[tuple[bytes | None, bytes | None]]] = {partition: [] for partition in range(PARTITIONS)}
        for number in numbers:
            rows[number % PARTITIONS].append((b"k%d" % number, json.dumps({"id": number}).encode()))
        produce(self.kafka, self.name, rows)

    def process(self, count: int = RECORDS) -> None:
        """Run the processor until it has made something of so many records."""
        with App(self.folder, self.settings) as app:
            app.until(lambda status: _done(status) >= count, "everything is processed")
            assert app.terminate() == 0


def _done(status: dict[str, Any]) -> int:
    counts = status["tasks"]["main"]["counts"]
    return int(counts["out"] + counts["dead"])


def ids(document: dict[str, Any], verdict: str) -> list[int]:
    """Which records have a verdict, by their place in the first application's input topic."""
    sources = [it["source"] for it in document["examples"] if it["verdict"] == verdict]
    return sorted(it["offset"] * PARTITIONS + it["partition"] for it in sources)


def test_a_replay_with_the_same_model_differs_in_nothing_and_with_a_new_one_in_exactly_what_it_changes(
    kafka: str, tmp_path: Path, topic_name: TopicName, streamproc: Streamproc
) -> None:
    live, again = (Application(tmp_path / part, kafka, topic_name(part), "Old") for part in ("live", "again"))
    live.produce(range(RECORDS))
    live.process()
    captured = read_to_end(kafka, live.name, PARTITIONS)
    golden = tmp_path / "golden.jsonl"
    results = read_to_end(kafka, f"{live.name}.results", PARTITIONS)
    golden.write_bytes(b"".join(write_full(it) + b"\n" for it in results))

    def replay(run: str) -> None:
        marked = [
            MemoryRecord(it.topic, it.partition, it.offset, it.timestamp, it.key, it.value, tuple(headers))
            for it in captured
            for headers in [mark(it.headers, run, Source(it.topic, it.partition, it.offset))]
        ]
        lines = tmp_path / f"{run}.jsonl"
        lines.write_bytes(b"".join(write_full(it) + b"\n" for it in marked))
        streamproc("produce", again.name, str(lines), "--full", "-b", kafka)

    replay("monday")
    again.process()
    told = streamproc("replay", "diff", "golden.jsonl", f"{again.name}.results@monday", "-b", kafka)
    assert f"0 of {RECORDS} records differ, within the limit of 0" in told.stdout

    again.settings["backend"]["path"] = "models:New"
    replay("tuesday")
    again.process()
    against = ("golden.jsonl", f"{again.name}.results@tuesday", "-b", kafka, "--json", "--examples", "1000")
    dead = ("--candidate-dead", f"{again.name}.dead@tuesday")
    document = json.loads(streamproc("replay", "diff", *against, *dead, code=1).stdout)
    assert {verdict: count for verdict, count in document["verdicts"].items() if count} == {
        "equal": RECORDS - len(RENAMED) - len(REFUSED),
        "changed": len(RENAMED),
        "failed": len(REFUSED),
    }
    assert ids(document, "changed") == RENAMED
    assert ids(document, "failed") == REFUSED
    assert document["fields"] == [
        {
            "path": "label",
            "changed": len(RENAMED),
            "close": 0,
            "mean_absolute_difference": None,
            "max_absolute_difference": None,
            "transitions": [['"even"', '"EVEN"', len(RENAMED)]],
        }
    ]
    assert document["candidate"]["causes"] == {"rejected": len(REFUSED)}
    # Without the dead letters these results are missing; ten percent may differ, and a little more does.
    document = json.loads(streamproc("replay", "diff", *against, "--max-changed", "10%", code=1).stdout)
    assert document["verdicts"]["missing"] == len(REFUSED)
    streamproc("replay", "diff", *against, "--max-changed", "12%")
    streamproc("replay", "diff", *against, "--ignore", "label", "--max-changed", str(len(REFUSED)))

    unknown = streamproc("replay", "diff", "golden.jsonl", f"{again.name}.results@friday", "-b", kafka, code=1)
    assert "has no record of that run; there are monday, tuesday" in unknown.stderr


def test_a_shadow_run_tells_what_a_new_model_changes_and_touches_nothing(
    kafka: str, tmp_path: Path, topic_name: TopicName, streamproc: Streamproc
) -> None:
    live = Application(tmp_path, kafka, topic_name(), "Old")
    live.produce(range(RECORDS))
    shadow = ("replay", "shadow", "--from", "beginning", "--count", str(RECORDS), "--json", "--examples", "1000")
    same = json.loads(streamproc(*shadow, "--backend", "models:Old").stdout)
    assert (same["records"], same["verdicts"]["equal"], same["passed"]) == (RECORDS, RECORDS, True)

    page = tmp_path / "report.html"
    new = json.loads(streamproc(*shadow, "--backend", "models:New", "--html", str(page), code=1).stdout)
    assert ids(new, "changed") == RENAMED
    assert ids(new, "failed") == REFUSED
    assert new["records"] == new["verdicts"]["equal"] + len(RENAMED) + len(REFUSED) == RECORDS
    assert "<html" in page.read_text()

    assert committed(kafka, f"{live.name}.main", live.name, PARTITIONS) == {}
    for output in ("results", "dead"):
        assert ends(kafka, f"{live.name}.{output}", PARTITIONS) == dict.fromkeys(range(PARTITIONS), 0)


def test_a_shadow_run_follows_the_live_stream_until_it_is_interrupted(
    kafka: str, tmp_path: Path, topic_name: TopicName
) -> None:
    live = Application(tmp_path, kafka, topic_name(), "Old")
    live.produce(range(30))
    told, said = tmp_path / "told", tmp_path / "said"
    arguments = ("replay", "shadow", "--backend", "models:New", "--json")
    with told.open("wb") as out, said.open("wb") as err:
        running = subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, env=environ(), stdout=out, stderr=err)
        try:
            wait_until(lambda: "both ready" in said.read_text(), "both are ready", deadline_s=60)
            live.produce(range(RECORDS))
            wait_until(lambda: f"compared {RECORDS} records" in said.read_text(), "all are compared", deadline_s=60)
            running.send_signal(signal.SIGINT)
            assert running.wait(60) == 1
        finally:
            running.kill()
            running.wait()
    assert "Traceback" not in said.read_text()
    assert "ending; once more to exit at once" in said.read_text()
    # What was there before it began is not read.
    counts = {verdict: count for verdict, count in json.loads(told.read_text())["verdicts"].items() if count}
    assert counts == {
        "equal": RECORDS - len(RENAMED) - len(REFUSED),
        "changed": len(RENAMED),
        "failed": len(REFUSED),
    }


def test_two_models_are_compared_on_a_capture_without_kafka(tmp_path: Path, streamproc: Streamproc) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    settings = {"name": "app", "backend": {"path": "models:Old"}, "tasks": {"main": {"input": {"topics": ["in"]}}}}
    (tmp_path / "streamproc.yaml").write_text(yaml.safe_dump(settings))
    records = [
        MemoryRecord("in", it % PARTITIONS, it // PARTITIONS, 1_000 + it, b"k", json.dumps({"id": it}).encode())
        for it in range(RECORDS)
    ]
    (tmp_path / "capture.jsonl").write_bytes(b"".join(write_full(it) + b"\n" for it in records))
    shadow = ("replay", "shadow", "--capture", "capture.jsonl", "--backend", "models:New", "--examples", "1000")
    document = json.loads(streamproc(*shadow, "--json", code=1).stdout)
    assert ids(document, "changed") == RENAMED
    assert ids(document, "failed") == REFUSED
    told = streamproc(*shadow, "--max-changed", "50%").stdout
    for part in (
        'changed: in/0/0, key "k"',
        'label: "even" → "EVEN"',
        "dead letter",
        "execute, ms",
        "within the limit",
    ):
        assert part in told


def test_what_cannot_be_compared_is_told_in_a_sentence(tmp_path: Path, streamproc: Streamproc) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    other = MemoryRecord("in", 0, 0, 1, None, b"{}")
    (tmp_path / "other.jsonl").write_bytes(write_full(other) + b"\n")
    for arguments, code, sentence in (
        (("empty.jsonl", "other.jsonl"), 1, "empty.jsonl holds no results"),
        (("other.jsonl", "empty.jsonl"), 1, "holds no results: none of its 1 record says what it is"),
        (("absent.jsonl", "empty.jsonl"), 1, "absent.jsonl"),
        (("empty.jsonl", "topic"), 2, "there is no settings file"),
        (("empty.jsonl", "empty.jsonl", "--tolerance", "score"), 2, "names no tolerance"),
        (("empty.jsonl", "empty.jsonl", "--tolerance", "score=x"), 2, "--tolerance: 'x' is no tolerance"),
        (("empty.jsonl", "empty.jsonl", "--ignore", "a..b"), 2, "--ignore: 'a..b' is no field"),
        (("empty.jsonl", "empty.jsonl", "--max-changed", "some"), 2, "--max-changed: 'some' is no limit"),
        (("empty.jsonl", "empty.jsonl", "--html", "no/such/report.html"), 2, "there is no folder"),
    ):
        assert sentence in streamproc("replay", "diff", *arguments, code=code).stderr
    assert "nothing to compare with" in streamproc("replay", "shadow", code=2).stderr
