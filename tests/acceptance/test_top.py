"""``streamproc top`` beside a processor that streams from Kafka."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamproc.demo.inference import sample_records
from tests.support.app import App, create, produce
from tests.support.commands import run_command

RECORDS = 60_000


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
    with App(tmp_path / "app", settings) as app:
        app.until_ready()
        produce(kafka, topic, {0: [(None, b"{no record"), *backlog[::2]], 1: backlog[1::2]})

        def top() -> dict[str, Any]:
            done = run_command(
                tmp_path, "top", "--url", app.url, "--once", "--json", "--interval-s", "0.3", code=0, timeout_s=60
            )
            told: dict[str, Any] = json.loads(done.stdout)
            return told

        working = top()
        app.until(lambda status: status["tasks"]["digits"]["counts"]["out"] == RECORDS - 1, "all are done")
        idle = top()
        pids = app.worker_pids()
        url = app.url
        assert app.terminate() == 0
    task = working["tasks"]["digits"]
    # As fast as it goes: both readings are within the backlog, or it was done between them.
    assert task["results_per_s"] > 1_000
    assert task["batches_per_s"] > 10
    assert 0 < task["fill"] <= 1
    assert {"decode", "execute", "encode"} <= set(task["steps_ms"])
    assert [it["pid"] for it in working["replicas"][0]["workers"]] == pids
    task = idle["tasks"]["digits"]
    assert (task["results_per_s"], task["lag_records"], task["in_flight_records"]) == (0.0, 0, 0)
    assert (task["dead"], task["given_up_by_cause"]) == (1, {"invalid": 1})
    replica = idle["replicas"][0]
    assert (replica["name"], replica["generation"], replica["backend_version"]) == (topic, 1, "of the test")
    assert sum(it["batches"] for it in replica["workers"]) >= RECORDS / 64
    gone = run_command(tmp_path, "top", "--url", url, "--once", code=1, timeout_s=60)
    assert gone.stderr == (
        f"no sidecar answers at {url} (Connection refused); is the processor running there? --url names another\n"
    )
