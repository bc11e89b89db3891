"""Predictions over HTTP as a user asks for them: the digits demo, while Kafka streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from streamproc.demo.inference import sample_records
from tests.support.app import App, create, produce, read_to_end

TOKEN = "open sesame"  # noqa: S105 - of a test
BACKLOG = 30_000


@pytest.mark.parametrize("batch_with", ["apart", "kafka"])
def test_the_digits_demo_answers_requests_as_it_answers_kafka_while_that_streams(
    kafka: str, tmp_path: Path, topic_name: Callable[..., str], batch_with: str
) -> None:
    topic, images = topic_name(), sample_records()
    create(kafka, {topic: 2, f"{topic}.results": 2, f"{topic}.dead": 2, f"{topic}.metrics": 1})
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    settings = {
        "name": topic,
        "kafka": {"bootstrap_servers": kafka},
        "backend": {"path": "streamproc.demo.inference:Backend", "loader": "module"},
        "pool": {"threads_per_worker": 1},
        "tasks": {"digits": {"input": {"topics": [topic]}}},
        "http": {"port": 0, "token_file": str(tmp_path / "token"), "predict": {"batch_with": batch_with}},
    }
    rows = [(None, json.dumps(image).encode()) for image in images]
    backlog = [rows[number % len(rows)] for number in range(BACKLOG)]
    produce(kafka, topic, {partition: backlog[partition::2] for partition in range(2)})
    with App(tmp_path / "app", settings) as app:
        url = f"{app.url}/tasks/digits/predict"
        app.until_ready()
        assert httpx.post(url, json=images[0]).status_code == 401
        with ThreadPoolExecutor(8) as clients, httpx.Client(headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            answers = list(clients.map(lambda image: client.post(url, json=image), images[:200]))
            several = client.post(url, json=images[200:300])
        assert {answer.status_code for answer in (*answers, several)} == {200}
        told = [*(answer.json()["result"] for answer in answers), *several.json()["result"]]
        app.until(lambda status: status["tasks"]["digits"]["counts"]["out"] == BACKLOG, "Kafka's records are done")
        assert app.metric("streamproc_requests_total", task="digits", outcome="ok") == 201
        assert app.terminate() == 0
    results = [json.loads(record.value or b"")["result"] for record in read_to_end(kafka, f"{topic}.results", 2)]
    assert len(results) == BACKLOG
    by_kafka = {result["id"]: result["digit"] for result in results}
    assert [result["digit"] for result in told] == [by_kafka[image["id"]] for image in images[:300]]
    assert [result["id"] for result in told] == [image["id"] for image in images[:300]]
