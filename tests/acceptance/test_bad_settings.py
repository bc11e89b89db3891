"""Ten ways to get the settings wrong. Each ends as one clear sentence on standard error, and no traceback.

``check`` finds what can be found without Kafka, ``run`` all of it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import TopicName
from tests.support.commands import clean_environment

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
        done = subprocess.run(
            [sys.executable, "-m", "streamproc", *arguments],
            cwd=self.folder,
            env={**clean_environment(), **(environ or {})},
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
def test_several_at_once_have_a_hint_each(application: Application, command: str) -> None:
    application.change("max_size: 8", "max_sise: 8\n      max_wait: 3")
    application.run(command).is_one_sentence(
        2,
        "did you mean max_size?; also wrong: tasks.text.batch.max_wait (streamproc.yaml:12, did you mean max_wait_ms?)",
    )


@both
def test_an_address_without_a_port(application: Application, command: str) -> None:
    application.change("127.0.0.1:1", "localhost")
    application.run(command).is_one_sentence(
        2, "streamproc.yaml:3: kafka.bootstrap_servers: 'localhost' is no address of the form host:port"
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


def test_what_ends_a_processor_is_a_line_of_its_log(application: Application) -> None:
    lines = application.run("run").err.strip().splitlines()
    last = json.loads(lines[-1])
    assert last["level"] == "error"
    assert "no Kafka broker answers at 127.0.0.1:1" in last["message"]
    assert all(line.startswith("{") for line in lines)


def test_text_logs_end_with_a_sentence_of_text(application: Application) -> None:
    outcome = application.run("run", environ={"STREAMPROC_LOGGING__FORMAT": "text"})
    assert outcome.err.strip().splitlines()[-1].startswith("no Kafka broker answers at 127.0.0.1:1")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_processor_is_being_imported_ends_it_quietly(
    application: Application, number: signal.Signals, code: int
) -> None:
    # In the place of a module that takes long.
    (application.folder / "uvloop.py").write_text(
        "import threading\n"
        "print('importing', flush=True)\n"
        "try: threading.Event().wait()\n"
        "except BaseException as error: raise ImportError('broken') from None\n"
    )
    command = [sys.executable, "-m", "streamproc", "run"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=application.folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "importing\n"
            running.send_signal(number)
            _, err = running.communicate(timeout=20)
            assert (running.returncode, err) == (code, "")
        finally:
            running.kill()


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
