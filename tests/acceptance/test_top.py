"""``streamproc top`` beside a processor that streams from Kafka."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamproc.demo.inference import sample_records
from tests.support.app import App, create, produce
from tests.support.asyncs import wait_until
from tests.support.commands import clean_environment, run_command

RECORDS = 20_000


def test_top_tells_what_a_processor_does_while_it_streams_and_that_it_has_gone_afterwards(
    kafka: str, tmp_path: Path, topic_name: Callable[..., str]
) -> None:
    topic = topic_name()
    create(kafka, {topic: 2, f"{topic}.results": 2, f"{topic}.dead": 2, f"{topic}.metrics": 1})
    settings = {
        "name": topic,
        "kafka": {"bootstrap_servers": kafka},
        "backend": {"path": "streamproc.demo.inference:Backend", "loader": "module", "version": "of the test"},
        "pool": {"workers": 2, "threads_per_worker": 1},
        "tasks": {"digits": {"input": {"topics": [topic]}}},
    }
    images = [(None, json.dumps(it).encode()) for it in sample_records()]
    backlog = [images[number % len(images)] for number in range(RECORDS - 1)]
    with App(tmp_path / "app", settings) as app, (tmp_path / "lines").open("wb") as lines:
        app.until_ready()
        command = [sys.executable, "-m", "streamproc", "top", "--url", app.url, "--json", "--interval-s", "0.2"]
        watching = subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), stdout=lines)
        try:
            wait_until(lambda: told(tmp_path), "it looks on")
            produce(kafka, topic, {0: [(None, b"{no record"), *backlog[::2]], 1: backlog[1::2]})
            wait_until(lambda: any(it["results_per_s"] > 1_000 for it in told(tmp_path)), "it tells the throughput")
            app.until(lambda status: status["tasks"]["digits"]["counts"]["out"] == RECORDS - 1, "all are done")
            wait_until(lambda: told(tmp_path)[-1]["in_flight_records"] == 0, "it tells the end")
            watching.send_signal(signal.SIGTERM)
            assert watching.wait(30) == 128 + signal.SIGTERM
        finally:
            watching.kill()
            watching.wait()
        done = run_command(tmp_path, "top", "--url", app.url, "--once", "--json", code=0, timeout_s=60)
        idle = json.loads(done.stdout)
        pids, url = app.worker_pids(), app.url
        assert app.terminate() == 0
    fastest = max(told(tmp_path), key=lambda it: float(it["results_per_s"]))
    task = fastest["tasks"]["digits"]
    assert task["batches_per_s"] * 64 >= task["results_per_s"] * 0.9
    assert 0 < task["fill"] <= 1
    assert {"decode", "execute", "encode"} <= set(task["steps_ms"])
    task = idle["tasks"]["digits"]
    assert (task["results_per_s"], task["lag_records"], task["in_flight_records"]) == (0.0, 0, 0)
    assert (task["dead"], task["given_up_by_cause"]) == (1, {"invalid": 1})
    replica = idle["replicas"][0]
    assert (replica["name"], replica["generation"], replica["backend_version"]) == (topic, 1, "of the test")
    assert [it["pid"] for it in replica["workers"]] == pids
    assert sum(it["batches"] for it in replica["workers"]) >= RECORDS / 64
    gone = run_command(tmp_path, "top", "--url", url, "--once", code=1, timeout_s=60)
    assert gone.stderr == (
        f"no sidecar answers at {url} (Connection refused); is the processor running there? --url names another\n"
    )


def told(folder: Path) -> list[dict[str, Any]]:
    """The lines so far that have a rate."""
    found = [json.loads(line) for line in (folder / "lines").read_text().splitlines(keepends=True) if line[-1] == "\n"]
    return [it for it in found if it["results_per_s"] is not None]
