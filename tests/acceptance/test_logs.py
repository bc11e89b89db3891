"""The log of a processor at its most talkative: what it says of each batch, and what it never says."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from streamproc.broker.producer import KafkaProducer
from tests.support.app import App, create, ends, headers, kafka_settings, read_to_end

MARK = "marked4711"
"""In whatever a record holds."""
HIDDEN = "hidden4711"
"""In whatever is secret."""
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"

BACKEND = """
import os
import signal

from streamproc import BackendConfig, InferenceBackend, RecordError


class Config(BackendConfig):
    password: str


class Backend(InferenceBackend):
    backend_config_model = Config

    def length(self, record):
        if record.get("do") == "length":
            raise ValueError(f"no length of {record}")
        return 1

    def execute(self, inputs):
        self.logger.info("scoring {} records", len(inputs))
        return [self.act(record) for record in inputs]

    def act(self, record):
        do, text = record.get("do"), record["text"]
        if do == "raise":
            raise ValueError(f"cannot use {text}")
        if do == "chain":
            try:
                return int(text)
            except ValueError as error:
                raise RuntimeError(text) from error
        if do == "memory":
            raise MemoryError(text)
        if do == "reject":
            return RecordError(text)
        if do == "object":
            return {"text": type(text, (), {"__repr__": lambda self: text})()}
        if do == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return text if do == "output" else {"text": text}
"""
FAILING = ["raise", "chain", "memory", "reject", "object", "die", "output"]
SCHEMA = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 20}}, "required": ["text"]}


def write(bootstrap_servers: str, topic: str, values: list[bytes]) -> None:
    traceparent = ("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01".encode())

    async def go() -> None:
        producer = KafkaProducer(kafka_settings(bootstrap_servers), client_id="test", max_batch_bytes=900_000)
        await producer.start()
        batch = producer.create_batch()
        for value in values:
            some = [("other", MARK.encode()), traceparent]
            assert batch.append(timestamp=None, key=MARK.encode(), value=value, headers=some) is not None
        await (await producer.send_batch(batch, topic, 0))
        await producer.stop()

    asyncio.run(go())


def record(**fields: Any) -> bytes:
    return json.dumps({"text": MARK, **fields}).encode()


def test_each_execution_has_a_line_and_neither_records_nor_secrets_are_in_any(
    embedded_broker: str, tmp_path: Path, topic_name: Callable[..., str]
) -> None:
    """Whatever fails, in whatever way: what was said of it is in the dead letters alone."""
    name = topic_name()
    topics = [f"{name}.{task}" for task in ("main", "measured")]
    every = [f"{topic}{suffix}" for topic in topics for suffix in ("", ".results", ".dead")]
    create(embedded_broker, dict.fromkeys([*every, f"{name}.metrics"], 1))
    (tmp_path / "inference.py").write_text(BACKEND)
    (tmp_path / "topics").mkdir()
    (tmp_path / "topics" / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "topics" / f"{topics[0]}.yaml").write_text(f"topic: {topics[0]}\npartitions: 1\nschema: schema.json\n")
    settings = {
        "name": name,
        "kafka": {"bootstrap_servers": embedded_broker},
        "schema_registry": {"url": "http://127.0.0.1:9", "username": "me", "password": HIDDEN},
        "backend": {"path": "inference:Backend", "config": {"password": HIDDEN}},
        "pool": {"restart_backoff_ms": 5},
        "http": {"port": 0, "token": HIDDEN},
        "logging": {"level": "debug", "format": "json"},
        # Nobody is there.
        "tracing": {"enabled": True, "endpoint": "http://127.0.0.1:9"},
        "tasks": {
            "main": {"input": {"topics": [topics[0]], "max_value_bytes": 100_000}},
            "measured": {"input": {"topics": [topics[1]]}, "batch": {"length": "backend"}},
        },
    }
    for task in ("main", "measured"):
        tasks: dict[str, Any] = settings["tasks"]  # type: ignore[assignment]  # as written above
        tasks[task] |= {"on_error": {"backoff_ms": 1}, "commit_interval_ms": 50}
    bad = [
        MARK.encode(),
        f'["{MARK}"]'.encode(),
        b'{"text":"\xff%s"}' % MARK.encode(),
        record(text=MARK * 3),
        record(pad=MARK * 20_000),
    ]
    write(embedded_broker, topics[0], [*bad, *(record(do=do) for do in FAILING), *[record()] * 5])
    write(embedded_broker, topics[1], [record(do="length"), record()])
    environ = {**os.environ, "OTEL_EXPORTER_OTLP_HEADERS": f"api-key={HIDDEN}", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    environ["OTEL_EXPORTER_OTLP_TIMEOUT"] = "1"
    with App(tmp_path, settings, environ) as app:
        app.until(lambda status: status["tasks"]["main"]["counts"]["dead"] == 12, "what fails has failed")
        app.until(lambda status: status["tasks"]["measured"]["counts"]["dead"] == 1, "in the other task too")
        app.until(lambda status: status["tasks"]["main"]["counts"]["out"] == 5, "the others have results")
        for body in ({"text": MARK}, {"text": MARK, "do": "raise"}, {"text": MARK, "do": "reject"}, MARK):
            httpx.post(
                f"{app.url}/tasks/main/predict?q={MARK}",
                json=body,
                headers={"authorization": f"Bearer {HIDDEN}", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"},
            )
        httpx.post(f"{app.url}/tasks/main/predict", json={}, headers={"authorization": f"Bearer {HIDDEN}x"})
        app.get("/metrics")
        executed = app.metric("streamproc_batches_total")
        assert app.terminate() == 0
    assert sum(ends(embedded_broker, f"{topics[0]}.dead", 1).values()) == 12
    log = app.log()
    assert MARK not in log
    assert HIDDEN not in log
    said = [MARK in headers(it).get("streamproc-error-message", "") for it in read_to_end(embedded_broker, every[2], 1)]
    assert sum(said) >= 3, "the dead letters have what was said"

    # What is wrong with the environment is said before it is known how to log; here it may be that of CI.
    lines = [json.loads(it) for it in log.splitlines() if "STREAMPROC_REQUIRE_" not in it]
    assert [line["level"] for line in lines if line["logger"] == "aiokafka"] == []
    ran = [line for line in lines if "wall_ms" in line]
    failed = [line for line in lines if "attempt" in line and "wall_ms" not in line]
    assert {line["level"] for line in ran} == {"debug"}
    assert {line["level"] for line in failed} == {"warning"}
    assert len(ran) + len(failed) == executed
    assert max(Counter((line["batch"], line["attempt"]) for line in (*ran, *failed)).values()) == 1, "a line for each"
    for line in ran:
        assert line["results"] + line["failed"] == line["records"]
        assert {"task", "worker", "closed_by", "queue_ms", "decode_ms", "encode_ms", "offsets"} <= set(line)
        assert "steps_ms" in line or not line["results"], "the backend ran"
    alone = [line for line in failed if line["records"] == 1 and "offset" in line]
    assert {(line["cause"], line["offset"]) for line in alone if line["task"] == "main"} >= {
        *(("exception", 5), ("exception", 6), ("oom", 7), ("crash", 10)),
    }
    assert all(line["topic"] == topics[0] and line["partition"] == 0 for line in alone)
    assert all(len(line["trace_id"]) == 32 for line in (*ran, *failed))

    backend = [line for line in lines if "scoring" in line["message"]]
    known = {(line["task"], line["batch"], line["worker"], line["trace_id"]) for line in (*ran, *failed)}
    assert backend
    assert {(line["task"], line["batch"], line["worker"], line["trace_id"]) for line in backend} <= known
    first = next(line for line in lines if line["message"].startswith("task main: the first of these: execute"))
    assert 'raise ValueError(f"cannot use {text}")' in first["exception"]
    assert first["exception"].endswith("ValueError")

    dead = [line for line in lines if "became dead letters" in line["message"]]
    assert {(line["task"], line["trace_id"]) for line in dead} == {("main", TRACE), ("measured", TRACE)}
    assert all({"topic", "partition", "offset", "cause"} <= set(line) for line in dead)

    requests = [line for line in lines if "path" in line]
    assert {line["path"] for line in requests} == {"/tasks/main/predict"}, "and none of what is polled"
    assert [line["status"] for line in requests] == [200, 500, 422, 422, 401]
    assert [line.get("trace_id") for line in requests] == [TRACE] * 4 + [None]

    exporting = [line["message"] for line in lines if line["logger"] == "streamproc.observe.span_export"]
    assert sum("do not reach the collector" in message for message in exporting) == 1
    assert "spans were lost" in exporting[-1]
    assert not [line for line in lines if line["logger"].startswith(("opentelemetry", "urllib3"))]
