"""Hot reload as an operator does it: under load, by command and by signal, with good versions and broken ones."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.app import ROOT, App, committed, create, kafka_settings, produce, read_to_end
from tests.support.asyncs import wait_until

PARTITIONS = 4
BACKEND = """
from streamproc import InferenceBackend

class Backend(InferenceBackend):
    def execute(self, inputs):
        return [{"id": it["id"], "version": VERSION} for it in inputs]

VERSION = %s
"""

ON_A_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, "-m", "streamproc", *sys.argv[2:]])
"""


def reload(*arguments: str) -> tuple[int, str]:
    """``streamproc reload`` with these arguments: exit code and standard error."""
    command = [sys.executable, "-m", "streamproc", "reload", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    return done.returncode, done.stderr


class Load(threading.Thread):
    """Writes records until it is told to stop, to all partitions."""

    def __init__(self, kafka: str, topic: str) -> None:
        super().__init__()
        self._kafka, self._topic = kafka, topic
        self._enough = threading.Event()
        self.written = 0
        """To each partition."""

    def run(self) -> None:
        while not self._enough.wait(0.01):
            numbers = range(self.written, self.written + 50)
            rows = [(b"%d" % number, json.dumps({"id": number}).encode()) for number in numbers]
            produce(self._kafka, self._topic, {partition: list(rows) for partition in range(PARTITIONS)})
            self.written += len(numbers)

    def stop(self) -> None:
        self._enough.set()
        self.join()


@pytest.fixture
def load(kafka: str, topic_name: Callable[..., str]) -> Iterator[Load]:
    topic = topic_name()
    create(kafka, {topic: PARTITIONS, f"{topic}.results": PARTITIONS, f"{topic}.dead": 1, f"{topic}.metrics": 1})
    it = Load(kafka, topic)
    it.start()
    yield it
    it.stop()


def settings_of(kafka: str, topic: str, folder: Path, version: int) -> dict[str, Any]:
    return {
        "name": topic,
        "kafka": kafka_settings(kafka).model_dump(include={"bootstrap_servers"}),
        "backend": {"path": "inference:Backend", "base_dir": str(folder), "version": f"v{version}"},
        "pool": {"workers": 2},
        "tasks": {"main": {"input": {"topics": [topic]}, "commit_interval_ms": 100, "batch": {"max_size": 32}}},
        "http": {"port": 0},
    }


def test_ten_reloads_under_load_leave_no_gap_no_duplicate_and_no_rebalance_and_a_broken_version_is_refused(
    kafka: str, tmp_path: Path, load: Load
) -> None:
    topic = load._topic
    app = App(tmp_path, settings_of(kafka, topic, tmp_path, 0))

    def write(version: int, code: str | None = None) -> None:
        (tmp_path / "inference.py").write_text(BACKEND % version if code is None else code)
        app.file.write_text(json.dumps(settings_of(kafka, topic, tmp_path, version)))

    def results(status: dict[str, Any]) -> int:
        return int(status["tasks"]["main"]["counts"]["out"])

    write(0)
    with app:
        app.until_ready()
        before = app.until(lambda status: results(status) > 0, "the first results")
        members = [(it["partition"], it["epoch"]) for it in before["tasks"]["main"]["partitions"]]
        assert len(members) == PARTITIONS
        workers = set(app.worker_pids())
        for version in range(1, 11):
            write(version)
            if version % 2:
                code, said = reload("--url", app.url)
                assert (code, said.partition(": ")[2]) == (0, f"backend version v{version}, generation {version + 1}\n")
            else:
                app.process.send_signal(signal.SIGHUP)
            status = app.until(
                lambda status, version=version: status["generation"] == version + 1,  # type: ignore[misc]
                f"version {version} is in force",
            )
            assert (status["backend_version"], status["last_reload"]["outcome"]) == (f"v{version}", "taken")
            done = results(status)
            app.until(lambda status, done=done: results(status) > done, "it works")  # type: ignore[misc]
            assert workers.isdisjoint(app.worker_pids())
            workers.update(app.worker_pids())

        write(11, "import no_such_module")
        code, said = reload("--url", app.url)
        assert code == 1
        assert "refused, and the version before goes on: its worker 0 did not become ready" in said
        assert "no_such_module" in said
        write(11)
        app.file.write_text(app.file.read_text().replace('"max_size": 32', '"max_sise": 32'))
        code, said = reload("--url", app.url)
        assert code == 1
        assert "max_sise" in said
        assert "max_size" in said, "the nearest setting that there is"
        status = app.get("/status").json()
        assert (status["generation"], status["backend_version"]) == (11, "v10")
        assert (status["last_reload"]["outcome"], "max_sise" in status["last_reload"]["reason"]) == ("refused", True)
        assert app.metric("streamproc_reloads_total", outcome="taken") == 10
        assert app.metric("streamproc_reloads_total", outcome="refused") == 2
        assert "reload: refused" in app.log()

        load.stop()
        app.until(
            lambda _: sum(committed(kafka, f"{topic}.main", topic, PARTITIONS).values()) == load.written * PARTITIONS,
            "everything is committed",
        )
        after = app.get("/status").json()
        assert members == [(it["partition"], it["epoch"]) for it in after["tasks"]["main"]["partitions"]]
        assert app.metric("streamproc_rebalances_total") == 1, "the first one"
        assert after["tasks"]["main"]["counts"]["retried"] == 0
        assert app.terminate() == 0

    found = [json.loads(it.value or b"") for it in read_to_end(kafka, f"{topic}.results", PARTITIONS)]
    every = Counter((it["source"]["partition"], it["source"]["offset"]) for it in found)
    assert every == Counter((partition, offset) for partition in range(PARTITIONS) for offset in range(load.written))
    of_partition: dict[int, list[int]] = defaultdict(list)
    for it in found:
        of_partition[it["source"]["partition"]].append(it["result"]["version"])
        assert it["backend_version"] == f"v{it['result']['version']}", "the envelope says who made it"
    for versions in of_partition.values():
        assert versions == sorted(versions), "no record goes to an old version after one has gone to the next"
    records = [json.loads(it.value or b"") for it in read_to_end(kafka, f"{topic}.metrics", 1)]
    told: Counter[str] = Counter()
    for record in records:
        told[record["backend_version"]] += record["records"]
    assert told == Counter(f"v{it['result']['version']}" for it in found), "each batch has the version that ran it"
    assert set(told) == {f"v{version}" for version in range(11)}


@pytest.mark.parametrize("nohup", [False, True], ids=["", "nohup"])
def test_a_processor_whose_terminal_is_closed_stops_rather_than_goes_on_unseen(
    nohup: bool, kafka: str, tmp_path: Path, load: Load
) -> None:
    load.stop()
    (tmp_path / "inference.py").write_text(BACKEND % 1)
    file, log = tmp_path / "streamproc.yaml", tmp_path / "log"
    file.write_text(json.dumps(settings_of(kafka, load._topic, tmp_path, 1)))
    terminal, end = pty.openpty()
    with log.open("wb") as stderr, os.fdopen(end, "rb", buffering=0) as stdin:
        process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, "nohup" if nohup else "", "run", "-c", str(file)],
            stdin=stdin,
            stdout=stderr,
            stderr=stderr,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: '"ready"' in log.read_text(), "it is ready", deadline_s=60)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "generation 2 in force" in log.read_text(), "a reload, while the terminal is there")
        os.close(terminal)
        if nohup:
            wait_until(lambda: _hangup_reloads(process, log), "a reload, by a signal that no terminal sent")
            process.terminate()
        assert process.wait(30) == 0, "it drained"
    finally:
        process.kill()
        process.wait()
    assert ("SIGTERM: draining" if nohup else "SIGHUP: draining") in log.read_text()


def _hangup_reloads(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Signals until one is taken: the terminal's own may still be on its way, and two that come together are one."""
    said = log.read_text()
    if said.count("SIGHUP: reloading") < 2:
        process.send_signal(signal.SIGHUP)
    return "generation 3 in force" in said
