"""The circuit as a user meets it: a broken model, the command, a mended model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.app import ROOT, App, committed, create, headers, produce, read_to_end, source

RECORDS = 400


def circuit(*arguments: str) -> tuple[int, str, str]:
    """``streamproc circuit`` with these arguments: exit code, standard output and error."""
    command = [sys.executable, "-m", "streamproc", "circuit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def test_paused_replicas_let_others_in_and_stop_at_once_and_nothing_is_lost(
    kafka: str, tmp_path: Path, topic_name: Callable[..., str]
) -> None:
    topic, mended = topic_name(), tmp_path / "mended"
    create(kafka, {topic: 6, f"{topic}.results": 6, f"{topic}.dead": 6, f"{topic}.metrics": 1})
    settings = {
        "name": topic,
        "kafka": {"bootstrap_servers": kafka},
        "backend": {"path": "tests.support.backends:Scripted", "base_dir": str(ROOT)},
        "rebalance_drain_s": 120,
        "shutdown_timeout_s": 120,
        "tasks": {
            "main": {
                "input": {"topics": [topic]},
                "on_error": {"retries": 0, "circuit": {"min_records": 100, "close_after_s": None}},
                "commit_interval_ms": 100,
            }
        },
    }
    values = [json.dumps({"id": index, "do": "fail", "until": str(mended)}).encode() for index in range(6_000)]
    produce(kafka, topic, {partition: [(None, value) for value in values[partition::6]] for partition in range(6)})

    def is_open(status: dict[str, Any]) -> bool:
        return bool(status["tasks"]["main"]["circuit"]["state"] == "open")

    def holds(count: int) -> Callable[[dict[str, Any]], bool]:
        return lambda status: len(status["tasks"]["main"]["partitions"]) == count

    with App(tmp_path / "first", settings) as first, App(tmp_path / "second", settings) as second:
        first.until(is_open, "the first one's circuit opens")
        second.until(is_open, "so does the second one's")
        for app in (first, second):
            app.until(holds(3), "they share the partitions")
        assert first.terminate() == 0, "it is soon, since the deadline of this is less than what a drain may take"
        second.until(holds(6), "the second one has them all")
        assert is_open(second.get("/status").json())
        mended.touch()
        assert circuit("close", "--url", second.url)[0] == 0
        second.until(
            lambda _: sum(committed(kafka, f"{topic}.main", topic, 6).values()) == 6_000, "everything is committed"
        )
        assert second.terminate() == 0
    found = {source(it) for it in read_to_end(kafka, f"{topic}.results", 6)}
    for letter in read_to_end(kafka, f"{topic}.dead", 6):
        told = headers(letter)
        found.add((int(told["streamproc-source-partition"]), int(told["streamproc-source-offset"])))
    assert found == {(partition, offset) for partition in range(6) for offset in range(1_000)}


def test_a_broken_model_pauses_its_task_until_the_command_and_everything_is_delivered(
    embedded_broker: str, tmp_path: Path, topic_name: Callable[..., str]
) -> None:
    topic, mended = topic_name(), tmp_path / "mended"
    create(embedded_broker, {topic: 1, f"{topic}.results": 1, f"{topic}.dead": 1, f"{topic}.metrics": 1})
    limits = {"min_records": 100, "close_after_s": 3_600}
    settings = {
        "name": topic,
        "kafka": {"bootstrap_servers": embedded_broker},
        "backend": {"path": "tests.support.backends:Scripted", "base_dir": str(ROOT)},
        "tasks": {
            "main": {
                "input": {"topics": [topic]},
                "on_error": {"retries": 0, "circuit": limits},
                "commit_interval_ms": 100,
            }
        },
    }
    values = [json.dumps({"id": index, "do": "fail", "until": str(mended)}).encode() for index in range(RECORDS)]
    produce(embedded_broker, topic, {0: [(None, value) for value in values]})
    with App(tmp_path, settings) as app:
        app.until(lambda status: status["tasks"]["main"]["circuit"]["state"] == "open", "the circuit opens")
        answer = app.get("/readyz")
        assert answer.status_code == 503
        assert any("the circuit is open: 100 of the last 100 records failed" in it for it in answer.json()["reasons"])
        assert app.get("/livez").status_code == 200
        assert app.metric("streamproc_circuit_open", task="main") == 1
        code, out, _ = circuit("status", "--url", app.url)
        assert code == 0
        assert out.splitlines()[1].split()[:4] == ["main", "open", "100", "100"]

        mended.touch()
        assert circuit("close", "main", "--url", app.url) == (0, "", "task main: the circuit is closed\n")
        app.until_ready()
        app.until(lambda _: committed(embedded_broker, f"{topic}.main", topic, 1) == {0: RECORDS}, "all is committed")

        code, _, err = circuit("open", "--url", app.url)
        assert (code, err) == (0, "task main: the circuit is open: opened by hand\n")
        told = json.loads(circuit("status", "--json", "--url", app.url)[1])["main"]
        assert (told["state"], told["closes_in_s"], told["openings"]) == ("open", None, 2)
        code, _, err = circuit("close", "txet", "--url", app.url)
        assert (code, err) == (2, "there is no task txet; the tasks are: main\n")
        assert app.terminate() == 0
    results, dead = (
        read_to_end(embedded_broker, f"{topic}.results", 1),
        read_to_end(embedded_broker, f"{topic}.dead", 1),
    )
    assert 100 <= len(dead) < RECORDS
    offsets = [source(it)[1] for it in results] + [int(headers(it)["streamproc-source-offset"]) for it in dead]
    assert Counter(offsets) == Counter(range(RECORDS))
