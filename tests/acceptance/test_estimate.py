"""``estimate``: what batches cost, measured on a backend whose costs are known, in a process that may die of it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import run_command

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
BYTES_EACH = 4_000
"""What the backend needs for each unit of padded length."""
SETTINGS = """\
name: app
backend: {path: "inference:Backend", version: "7"}
pool: {threads_per_worker: 1}
tasks:
  text:
    input: {topics: [in]}
    batch: {length: bytes, max_size: 64}
"""
BACKEND = f"""\
import os

import numpy as np
from streamproc import InferenceBackend, RecordError

print("printed while loading")


class Backend(InferenceBackend):
    def execute(self, inputs):
        longest = max(len(record["text"]) for record in inputs) + 11
        # LIMIT
        held = np.ones(len(inputs) * longest * {BYTES_EACH // 8})
        for _ in range(3):
            held += 1
        return [{{"sum": float(held.sum())}} for _ in inputs]
"""

Estimate = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "streamproc.yaml").write_text(SETTINGS)
    (tmp_path / "inference.py").write_text(BACKEND)
    topics = tmp_path / "topics"
    topics.mkdir()
    (topics / "in.yaml").write_text("topic: in\nsamples: in.jsonl\n")
    lines = [json.dumps({"text": "word " * count}) for count in (4, 12, 40, 120)]
    (topics / "in.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def estimate(folder: Path) -> Estimate:
    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return run_command(folder, "estimate", "--time-limit", "8", *arguments, code=code, timeout_s=120)

    return run


def limited(folder: Path, line: str) -> None:
    (folder / "inference.py").write_text(BACKEND.replace("# LIMIT", line))


def test_the_planted_memory_is_found_and_all_of_it_is_told_and_written(estimate: Estimate, folder: Path) -> None:
    out = estimate().stdout
    assert "printed" not in out
    assert "app, task text: 4 sample records" in out
    assert "Time: a batch takes " in out
    assert "Memory: a worker holds " in out
    assert "For the task's batch section: max_size: " in out
    assert "Lengths from 31 to 611 bytes were measured" in out
    written = json.loads((folder / "text.estimate.json").read_text())
    assert written["length"] == "bytes"
    assert written["memory"]["c_bytes"] == pytest.approx(BYTES_EACH, rel=0.1)
    assert written["memory"]["a_bytes"] == pytest.approx(written["measured"]["idle_bytes"], rel=0.1)
    assert 1 <= written["kappa"] < 1.6
    assert written["measured"]["held_out"]["memory"] < 0.1
    assert written["fingerprint"]["backend version"] == "7"
    assert written["fingerprint"]["package numpy"]
    assert written["fingerprint"]["threads"] == "1"
    page = (folder / "text.estimate.html").read_text()
    assert page.count("<svg") == 5
    assert "<script" not in page


def test_a_script_gets_json_and_nothing_else(estimate: Estimate, folder: Path) -> None:
    found = json.loads(estimate("--json", "--max-size", "4", "--time-limit", "20").stdout)
    assert found == {"text": json.loads((folder / "text.estimate.json").read_text())}
    assert {it["largest"] for it in found["text"]["measured"]["at_lengths"]} == {4}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("if len(inputs) * longest > 9_000: raise MemoryError", "the backend says so"),
        ("if len(inputs) * longest > 9_000: os.kill(os.getpid(), 9)", "the kernel ends its process"),
    ],
    ids=["the backend says so", "its process is ended"],
)
def test_the_largest_batch_that_fits_is_found_within_5_percent_where(
    estimate: Estimate, folder: Path, line: str, what: str
) -> None:
    limited(folder, line)
    found = json.loads(estimate("--json", "--time-limit", "20").stdout)["text"]
    ended = [it for it in found["measured"]["at_lengths"] if it["ended_by"] == "memory"]
    assert ended, what
    for it in ended:
        assert it["largest"] * it["length"] <= 9_000
        assert max(it["largest"] * 1.05, it["largest"] + 1) * it["length"] >= 9_000 * 0.95


def test_a_budget_ends_it_before_the_machine_suffers(estimate: Estimate) -> None:
    out = estimate("--memory-budget", "110MiB", "--time-limit", "20").stdout
    assert "Memory ended the search at " in out
    assert "The budget is 110 MiB (--memory-budget): room for " in out


def test_records_may_come_from_a_file_or_a_capture(estimate: Estimate, folder: Path) -> None:
    (folder / "mine.jsonl").write_text('{"text": "abc"}\n{"text": "abcdef"}\n')
    assert "Lengths from 14 to 17 bytes" in estimate("--records", "mine.jsonl", "--time-limit", "2").stdout
    lines = [
        {"topic": topic, "partition": 0, "offset": offset, "timestamp": 1, "key": None, "headers": [], "value": value}
        for offset, (topic, value) in enumerate(
            [("in", {"text": "four"}), ("in", 5), ("other", {"text": "x" * 99}), ("in", {"text": "eightish"})]
        )
    ]
    (folder / "capture.jsonl").write_text("".join(json.dumps(it) + "\n" for it in lines))
    assert "Lengths from 15 to 19 bytes" in estimate("--capture", "capture.jsonl", "--time-limit", "2").stdout


def test_without_a_length_only_the_number_of_records_counts(estimate: Estimate, folder: Path) -> None:
    (folder / "streamproc.yaml").write_text(SETTINGS.replace("length: bytes, ", ""))
    done = estimate("--time-limit", "3")
    assert "batch.length is not set" in done.stdout
    assert "max_padded" not in done.stdout
    assert json.loads((folder / "text.estimate.json").read_text())["max_padded"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--memory-budget", "much"), 2, "--memory-budget much is no size"),
        (("--memory-budget", "10MiB"), 1, "not even the shortest record fits into 10 MiB"),
        (("--task", "txt"), 2, "there is no task txt"),
        (("--capture", "a", "--records", "b"), 2, "two sources"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(
    estimate: Estimate, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    assert sentence in estimate(*arguments, code=code).stderr


def test_without_samples_it_says_where_they_go(estimate: Estimate, folder: Path) -> None:
    (folder / "topics" / "in.yaml").write_text("topic: in\n")
    assert "task text has no sample records: declare `samples`" in estimate(code=1).stderr


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("raise ValueError('no model')", "a batch of 1 sample records failed: execute() raised ValueError: no model"),
        ("return [RecordError('bad')] * len(inputs)", "1 of 1 sample records fail"),
        ("os._exit(3)", "its process ended with exit code 3"),
    ],
)
def test_a_backend_that_fails_is_a_sentence(estimate: Estimate, folder: Path, line: str, sentence: str) -> None:
    limited(folder, line)
    assert sentence in estimate(code=1).stderr
