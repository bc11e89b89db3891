"""A short chaos run, always the same one, as ``make chaos`` does it for longer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.replica import ROOT
from tests.chaos.schedule import Kind

SEED, MINUTES, RATE = 3, 1.0, 300
DELIVERY = "both"


@pytest.mark.usefixtures("kafka_available")
@pytest.mark.timeout(420)  # a minute of faults, and around it three nodes and three replicas that start and stop
def test_nothing_is_lost_whatever_is_killed_paused_or_cut_off(tmp_path: Path) -> None:
    file, directory = tmp_path / "report.json", tmp_path / "chaos"
    options = {"seed": SEED, "minutes": MINUTES, "rate": RATE, "delivery": DELIVERY, "directory": directory}
    command = [sys.executable, "-m", "tests.chaos.run", "--json", str(file)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said, _ = process.communicate(timeout=400)
        finally:
            process.terminate()  # in order: it ends its nodes and replicas
    assert process.returncode == 0, said
    report = json.loads(file.read_text())
    assert report["ok"]
    assert report["findings"] == {}
    # That it was a run worth the name: everything happened, under load, and the oracle had something to compare.
    assert {fault["kind"] for fault in report["faults"] if fault["began_s"] is not None} == set(Kind)
    for task in report["tasks"].values():
        assert task["records"] >= RATE * MINUTES * 60 * 0.9
        assert task["results"] + task["dead_letters"] == task["records"] + task["duplicates"]
        assert task["dead_letters"] > 0
        assert task["rebalances"] > 0
    assert sum(report["starts"].values()) > 3
    assert report["worker_restarts"] > 0
    assert not directory.exists()  # kept only where there is something to look up


def test_a_run_that_cannot_be_done_says_why_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.run", "--directory", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout.splitlines() == [f"{file} is no folder: give another --directory"]
