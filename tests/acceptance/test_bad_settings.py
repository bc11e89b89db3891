"""Ten ways to get the settings wrong. Each ends as one clear sentence on standard error, and no traceback.

``check`` finds what can be found without Kafka, ``run`` all of it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import TopicName

ROOT = Path(__file__).resolve().parents[2]

BACKEND = """\
from streamproc import InferenceBackend


class Backend(InferenceBackend):
    def execute(self, inputs):
        return [{"seen": True} for _ in inputs]
"""
SETTINGS = """\
name: app
kafka:
  bootstrap_servers: "127.0.0.1:1"
  connect_timeout_s: 1
backend:
  path: "inference:Backend"
tasks:
  text:
    input: {topics: [in]}
    batch:
      max_size: 8
http:
  port: 0
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    err: str

    def is_one_sentence(self, code: int, *parts: str) -> None:
        assert self.code == code, self.err
        assert "Traceback" not in self.err
        # A processor that has begun may have logged before it failed; the sentence comes last.
        sentence = self.err.strip().splitlines()[-1]
        for part in parts:
            assert part in sentence


class Application:
    """A folder with settings and a backend, to run commands in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "inference.py").write_text(BACKEND)
        self.settings(SETTINGS)

    def settings(self, text: str) -> None:
        (self.folder / "streamproc.yaml").write_text(text)

    def change(self, old: str, new: str) -> None:
        text = (self.folder / "streamproc.yaml").read_text()
        assert old in text
        self.settings(text.replace(old, new))

    def on_kafka(self, bootstrap_servers: str, topic: str) -> None:
        """Name a broker that is there, and create the topics."""
        self.change("127.0.0.1:1", bootstrap_servers)
        self.change("[in]", f"[{topic}]")
        applied = self.run("topics", "apply", "--yes")
        assert applied.code == 0, applied.err

    def run(self, *arguments: str, environ: Mapping[str, str] | None = None) -> Outcome:
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("STREAMPROC_", "INFERENCE_"))
        }
        done = subprocess.run(
            [sys.executable, "-m", "streamproc", *arguments],
            cwd=self.folder,
            env={**clean, "PYTHONPATH": str(ROOT), **(environ or {})},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Outcome(done.returncode, done.stderr)


@pytest.fixture
def application(tmp_path: Path) -> Application:
    return Application(tmp_path)


both = pytest.mark.parametrize("command", ["check", "run"])


@both
def test_an_unknown_key(application: Application, command: str) -> None:
    application.change("max_size: 8", "max_sise: 8")
    application.run(command).is_one_sentence(
        2, "streamproc.yaml:11: tasks.text.batch.max_sise: is no setting; did you mean max_size?"
    )


@both
def test_an_unknown_variable(application: Application, command: str) -> None:
    application.run(command, environ={"STREAMPROC_TASKS__TEXT__BATCH__MAX_SISE": "8"}).is_one_sentence(
        2, "environment variable STREAMPROC_TASKS__TEXT__BATCH__MAX_SISE", "did you mean", "MAX_SIZE"
    )


@both
def test_a_wrong_type(application: Application, command: str) -> None:
    application.change("max_size: 8", "max_size: eight")
    application.run(command).is_one_sentence(
        2, "streamproc.yaml:11: tasks.text.batch.max_size: expected a whole number, got 'eight'"
    )


@both
def test_a_missing_settings_file(application: Application, command: str) -> None:
    (application.folder / "streamproc.yaml").unlink()
    application.run(command).is_one_sentence(2, "there is no settings file streamproc.yaml", "create it", "--config")


def test_a_missing_backend_file(application: Application) -> None:
    (application.folder / "inference.py").unlink()
    application.run("check").is_one_sentence(
        1, "streamproc.yaml:6: backend.path: the backend 'inference:Backend'", "there is no file"
    )


def test_a_missing_class(application: Application) -> None:
    application.change("inference:Backend", "inference:Backed")
    application.run("check").is_one_sentence(1, "streamproc.yaml:6: backend.path", "has no 'Backed'")


def test_a_missing_class_in_a_processor(application: Application, embedded_broker: str, topic_name: TopicName) -> None:
    application.on_kafka(embedded_broker, topic_name())
    application.change("inference:Backend", "inference:Backed")
    application.run("run").is_one_sentence(1, "inference:Backed", "has no 'Backed'")


@both
def test_a_wait_longer_than_the_poll_interval_allows(application: Application, command: str) -> None:
    application.change("max_size: 8", "max_wait_ms: 300000")
    application.run(command).is_one_sentence(
        2,
        "streamproc.yaml:11: tasks.text.batch.max_wait_ms: 300000 is not below kafka.max_poll_interval_ms",
        "lower the wait or raise the interval",
    )


@both
def test_two_tasks_on_one_result_topic(application: Application, command: str) -> None:
    application.change("http:", "  image:\n    input: {topics: [images]}\n    output: {topic: in.results}\nhttp:")
    application.run(command).is_one_sentence(
        2,
        "streamproc.yaml:14: tasks.image.output.topic: tasks text and image both write results to in.results",
        "give tasks.image.output.topic a name of its own",
    )


def test_no_broker_at_the_address(application: Application) -> None:
    application.run("run").is_one_sentence(1, "127.0.0.1:1", "kafka.bootstrap_servers")


def test_check_touches_no_kafka(application: Application) -> None:
    assert application.run("check").code == 0


def test_a_missing_topic(application: Application, embedded_broker: str, topic_name: TopicName) -> None:
    topic = topic_name()
    application.change("127.0.0.1:1", embedded_broker)
    application.change("[in]", f"[{topic}]")
    application.run("run").is_one_sentence(1, topic, "not exist", "streamproc topics apply")


def test_a_wrong_password(application: Application, kafka_sasl: str) -> None:
    application.change("127.0.0.1:1", kafka_sasl)
    application.change(
        "connect_timeout_s: 1",
        "connect_timeout_s: 10\n  security_protocol: SASL_PLAINTEXT\n  sasl_mechanism: SCRAM-SHA-256\n"
        "  sasl_username: test",
    )
    outcome = application.run("run", environ={"STREAMPROC_KAFKA__SASL_PASSWORD": "wr0ng-pa55word"})
    outcome.is_one_sentence(1, "refuses", "kafka.sasl_password", "kafka.sasl_username (test)")
    assert "wr0ng-pa55word" not in outcome.err


def test_a_port_that_is_taken(application: Application, embedded_broker: str, topic_name: TopicName) -> None:
    application.on_kafka(embedded_broker, topic_name())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        application.change("port: 0", f"port: {port}")
        application.run("run").is_one_sentence(1, str(port), "http.port")
