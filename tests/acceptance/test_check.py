"""``check``: settings, topics and backend, without Kafka; and what it says of each way in which they can fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import run_command

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """\
name: app
backend:
  path: "inference:Backend"
  config: {feature_names: [a]}
pool: {env: {MODEL_SIZE: "7"}}
tasks:
  text:
    input: {topics: [in]}
    batch: {max_size: 2}
"""
BACKEND = """\
import os

import numpy as np
from streamproc import InferenceBackend, RecordError

print("printed while loading")


class Backend(InferenceBackend):
    def execute(self, inputs):
        assert len(inputs) <= 2
        os.write(1, b"printed by native code")
        size = int(os.environ["MODEL_SIZE"])
        return [{"size": size} if record["a"] else RecordError("no a") for record in inputs]
"""

Check = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "streamproc.yaml").write_text(SETTINGS)
    (tmp_path / "inference.py").write_text(BACKEND)
    topics = tmp_path / "topics"
    topics.mkdir()
    (topics / "in.yaml").write_text("topic: in\nschema: in.schema.json\nsamples: in.jsonl\n")
    (topics / "in.schema.json").write_text('{"type": "object", "required": ["a"]}')
    (topics / "in.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": 0}\n')
    return tmp_path


@pytest.fixture
def check(folder: Path) -> Check:
    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return run_command(folder, "check", *arguments, code=code, timeout_s=60)

    return run


def test_what_was_checked_is_shown(check: Check) -> None:
    out = check().stdout
    assert "printed" not in out
    assert "application app, tasks text" in out
    assert "1 declared in" in out
    assert "inference:Backend, loaded in" in out
    assert "3 sample records in, as many out, 1 of them failed by the backend itself" in out
    assert "fields: size" in out


def test_a_target_that_the_samples_cannot_keep_is_a_warning(check: Check, folder: Path) -> None:
    batch = "batch: {max_size: 2, target_latency_ms: %s, target_margin_ms: 1}"
    (folder / "streamproc.yaml").write_text(SETTINGS.replace("batch: {max_size: 2}", batch % 5_000))
    assert "warning" not in check().stdout
    (folder / "streamproc.yaml").write_text(SETTINGS.replace("batch: {max_size: 2}", batch % 1.001))
    finding = json.loads(check("--json").stdout)["checks"][-1]
    assert (finding["check"], finding["status"]) == ("task text", "warning")
    assert "a batch of 2 sample records took" in finding["detail"]
    assert "leaves 0.001 ms" in finding["detail"]


def test_a_script_gets_json_and_nothing_else(check: Check) -> None:
    report = json.loads(check("--json").stdout)
    assert report["ok"] is True
    assert [(it["check"], it["status"]) for it in report["checks"]] == [
        ("settings", "ok"),
        ("topics", "ok"),
        ("backend", "ok"),
        ("task text", "ok"),
    ]


def test_a_script_gets_json_of_a_failure_too(check: Check, folder: Path) -> None:
    (folder / "inference.py").unlink()
    done = check("--json", code=1)
    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert report["checks"][-1]["check"] == "backend"
    assert report["checks"][-1]["detail"] == done.stderr.strip()


def test_the_estimate_that_is_used_is_shown_with_what_differs(check: Check, folder: Path) -> None:
    estimate = {
        "length": None,
        "fingerprint": {"backend": "other:Backend"},
        "time": {"alpha_ms": 5},
        "memory": {"a_bytes": 1000},
        "max_size": 8,
    }
    (folder / "text.estimate.json").write_text(json.dumps(estimate))
    found = next(it for it in json.loads(check("--json").stdout)["checks"] if it["check"] == "estimate text")
    assert found["status"] == "ok"
    assert "text.estimate.json: a batch has at most 2 records; memory budget of a worker: " in found["detail"]
    assert "measured under other conditions (backend other:Backend, now inference:Backend)" in found["detail"]
    (folder / "text.estimate.json").write_text(json.dumps({**estimate, "length": "bytes"}))
    found = next(it for it in json.loads(check("--json").stdout)["checks"] if it["check"] == "estimate text")
    assert found["status"] == "skipped"
    assert "is not used: its lengths are bytes" in found["detail"]


def test_records_of_a_file_take_the_samples_place(check: Check, folder: Path) -> None:
    (folder / "mine.jsonl").write_text('{"a": 5}\n\n')
    assert "1 sample record in" in check("--records", "mine.jsonl").stdout


def test_without_samples_the_backend_is_loaded_and_no_more(check: Check, folder: Path) -> None:
    (folder / "topics" / "in.yaml").write_text("topic: in\n")
    assert "no sample records" in check().stdout


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1}\n{"secret": 1}\n', "mine.jsonl:2: the record"),
        ('{"secret": \n', "mine.jsonl:1: not JSON"),
        ("5\n", "mine.jsonl:1: not a JSON object"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(check: Check, folder: Path, text: str, sentence: str) -> None:
    (folder / "mine.jsonl").write_text(text)
    err = check("--records", "mine.jsonl", code=1).stderr
    assert err.startswith(sentence)
    assert "secret" not in err


def test_a_schema_that_is_none_is_named(check: Check, folder: Path) -> None:
    (folder / "topics" / "in.schema.json").write_text('{"type": "objekt"}')
    assert "in.schema.json" in check(code=2).stderr


def test_a_wrong_configuration_of_the_backend_has_its_line(check: Check, folder: Path) -> None:
    (folder / "streamproc.yaml").write_text(SETTINGS.replace("feature_names: [a]", "input_format: csv"))
    err = check(code=2).stderr.splitlines()[-1]
    assert err.startswith("streamproc.yaml:4: backend.config.input_format: ")


@pytest.mark.parametrize(
    ("execute", "sentence"),
    [
        ("os.abort()", "its process was killed by SIGABRT while it ran sample records"),
        ("os._exit(3)", "its process ended with exit code 3 while it ran sample records"),
        ("return []", "task text: a backend must return one output per input, but returned 0 for 2"),
        ("return [{'x': object()} for _ in inputs]", "index 0 cannot be written as JSON"),
        ("return np.array([0.5, 1])", 'for example [{"score": s} for s in scores.tolist()]'),
        ("return list(np.array([0.5, 1]))", "index 0 is not a dict but float64; return one dict per record"),
        (
            "raise ValueError('no model')",
            "task text: execute() of Backend failed: ValueError: no model at inference.py:11: raise ValueError(",
        ),
        (
            "import json; json.loads('{')",
            "line 1 column 2 (char 1) at inference.py:11: import json; json.loads('{')",
        ),
        ("raise SystemExit(4)", "task text: SystemExit: 4 at inference.py:11"),
    ],
)
def test_a_backend_that_fails_is_a_sentence(check: Check, folder: Path, execute: str, sentence: str) -> None:
    (folder / "inference.py").write_text(BACKEND.replace("assert len(inputs) <= 2", execute))
    assert sentence in check(code=1).stderr.splitlines()[-1]


LENGTH = """
    def length(self, record):
        return 1 + 1 // record["a"]

    def initialize(self):
        self.weights = [1]
"""


def measure(folder: Path, of: str, code: str = LENGTH) -> None:
    (folder / "streamproc.yaml").write_text(SETTINGS.replace("max_size: 2", f"max_size: 2, length: {of}"))
    (folder / "inference.py").write_text(BACKEND + code)


def test_the_samples_lengths_are_measured_as_the_measuring_process_does(check: Check, folder: Path) -> None:
    measure(folder, "backend")
    assert "1 without a length: length() of Backend raised ZeroDivisionError" in " ".join(check().stdout.split())


@pytest.mark.parametrize(
    ("of", "code", "sentence"),
    [
        (
            "backend",
            "",
            "task text: tasks.text.batch.length is backend, but Backend has no method length(record)",
        ),
        (
            "backend",
            LENGTH.replace("1 // record", "self.weights[0] // record"),
            "task text: none of the 3 sample records has a length: length() of Backend raised AttributeError",
        ),
        (
            "{field: b}",
            LENGTH,
            "task text: none of the 3 sample records has a length: the record has no field b, or null in it",
        ),
    ],
)
def test_lengths_that_cannot_be_had_are_a_sentence(
    check: Check, folder: Path, of: str, code: str, sentence: str
) -> None:
    measure(folder, of, code)
    assert sentence in check(code=1).stderr.splitlines()[-1]


def test_what_the_worker_delivers_passes(check: Check, folder: Path) -> None:
    """numpy's scalars and arrays, keys that are numbers, NaN: ``run`` writes them all."""
    execute = "return [{'x': np.float32(1), 'y': np.ones(2), 'z': float('nan'), 7: (1, np.int64(2))} for _ in inputs]"
    (folder / "inference.py").write_text(BACKEND.replace("assert len(inputs) <= 2", execute))
    assert "3 sample records in, as many out; " in check().stdout


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("raise KeyError('txet')", "KeyError: 'txet' at inference.py:6: raise KeyError('txet')"),
        (
            "import no_such_module",
            "ModuleNotFoundError: No module named 'no_such_module' at inference.py:6: import no_",
        ),
        ("x = = 1", "SyntaxError: invalid syntax (inference.py, line 6) at inference.py:6: x = = 1"),
        ("import helper", "ZeroDivisionError: division by zero at helper.py:1: 1 / 0"),
    ],
)
def test_a_backend_that_cannot_be_loaded_has_its_line(check: Check, folder: Path, line: str, place: str) -> None:
    (folder / "helper.py").write_text("1 / 0\n")
    (folder / "inference.py").write_text(BACKEND.replace('print("printed while loading")', line))
    assert place in check(code=1).stderr.splitlines()[-1]


def test_an_initialize_that_raises_has_its_line(check: Check, folder: Path) -> None:
    (folder / "inference.py").write_text(BACKEND + "\n    def initialize(self):\n        self.model = {}['weights']\n")
    err = check(code=1).stderr.splitlines()[-1]
    assert err.startswith("streamproc.yaml:3: backend.path: initialize() of Backend failed: KeyError: 'weights' at ")
    assert err.endswith("inference.py:17: self.model = {}['weights']")


@pytest.mark.parametrize(
    ("setting", "old", "new"),
    [
        ("initialize_timeout_s", 'print("printed while loading")', "import threading; threading.Event().wait()"),
        ("batch_timeout_s", "assert len(inputs) <= 2", "import threading; threading.Event().wait()"),
    ],
)
def test_each_limit_is_kept_and_named(check: Check, folder: Path, setting: str, old: str, new: str) -> None:
    (folder / "inference.py").write_text(BACKEND.replace(old, new))
    (folder / "streamproc.yaml").write_text(SETTINGS.replace("pool: {", f"pool: {{{setting}: 1.5, "))
    done = check(code=1)
    assert f"1.5 s, which is pool.{setting}" in done.stderr
    assert "FAILED" in done.stdout


def test_each_row_is_shown_when_it_is_there(folder: Path) -> None:
    (folder / "inference.py").write_text(
        BACKEND.replace("assert len(inputs) <= 2", "import threading; threading.Event().wait()")
    )
    with subprocess.Popen(
        [sys.executable, "-m", "streamproc", "check"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            assert running.stdout is not None
            rows = [running.stdout.readline() for _ in range(3)]
            assert [row.split()[:2] for row in rows] == [["settings", "ok"], ["topics", "ok"], ["backend", "ok"]]
            assert not any(row.endswith(" \n") for row in rows)
            running.send_signal(signal.SIGINT)
            assert running.wait(20) == 130
        finally:
            running.kill()


def test_output_keys_that_no_output_has_are_named(check: Check, folder: Path) -> None:
    (folder / "streamproc.yaml").write_text(SETTINGS.replace("[a]}", "[a], output_keys: [size, label]}"))
    assert "declared in output_keys, and in no output: label" in check().stdout


def test_samples_of_another_format_are_json_with_bytes_and_outputs_are_judged_by_theirs(
    check: Check, folder: Path
) -> None:
    settings = SETTINGS.replace(
        "input: {topics: [in]}", "input: {topics: [in], format: raw}\n    output: {format: raw}"
    )
    (folder / "streamproc.yaml").write_text(settings.replace("feature_names: [a]", "feature_names: []"))
    (folder / "topics" / "in.yaml").write_text("topic: in\nsamples: in.jsonl\n")
    (folder / "topics" / "in.jsonl").write_text('{"value": {"$base64": "/wA="}}\n')
    backend = "import streamproc\n\nclass Backend(streamproc.InferenceBackend):\n  def execute(self, inputs):\n"
    body = "        assert inputs == [{'value': bytes([255, 0])}]\n        return OUTPUT\n"
    (folder / "inference.py").write_text(backend + body.replace("OUTPUT", "inputs"))
    check()
    (folder / "inference.py").write_text(backend + body.replace("OUTPUT", "[{'value': 5}]"))
    assert "a raw result is" in " ".join(check(code=1).stderr.split())


def test_a_file_of_records_that_is_not_there_is_a_usage_error(check: Check) -> None:
    assert "none.jsonl: cannot be read" in check("--records", "none.jsonl", code=2).stderr


def test_a_task_that_does_not_exist_is_named(check: Check, folder: Path) -> None:
    (folder / "mine.jsonl").write_text('{"a": 5}\n')
    assert "the tasks are text" in check("--records", "mine.jsonl", "--task", "txt", code=2).stderr
