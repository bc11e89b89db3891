"""``streamproc simulate`` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

Simulate = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def simulate(tmp_path: Path) -> Simulate:
    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "streamproc", "simulate", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def test_a_synthetic_stream_by_all_strategies_with_a_plot(simulate: Simulate, tmp_path: Path) -> None:
    done = simulate("--records", "1000", "--rate", "300", "--max-padded", "16384", "--plot", "it.svg")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["strategy", "none", "fifo", "bucketed", "exact", "optimum"]
    assert (tmp_path / "it.svg").read_text().startswith("<svg")
    assert "plot in it.svg" in done.stderr


def test_a_target_is_kept_though_the_wait_would_miss_it(simulate: Simulate) -> None:
    arguments = ("--records", "500", "--rate", "20", "--strategy", "bucketed", "--max-wait-ms", "1000", "--json")
    late, kept = (
        json.loads(simulate(*arguments, *target).stdout)["strategies"]["bucketed"]
        for target in ((), ("--target-latency-ms", "150"))
    )
    assert late["within_target"] is None
    assert late["p50_ms"] > 150
    assert kept["within_target"] >= 0.99
    assert set(kept["closed_by"]) == {"slo"}
    shown = simulate("--records", "100", "--rate", "20", "--target-latency-ms", "150").stdout
    assert "within 150 ms" in shown.splitlines()[0]


def test_the_way_to_a_worker_takes_the_time_that_is_asked_for(simulate: Simulate) -> None:
    arguments = ("--records", "200", "--rate", "5", "--strategy", "fifo", "--json")
    near, far = (
        json.loads(simulate(*arguments, "--handover-ms", it).stdout)["strategies"]["fifo"]["p50_ms"]
        for it in ("0", "7")
    )
    assert far - near == pytest.approx(7)


def test_the_same_arguments_give_the_same_figures(simulate: Simulate) -> None:
    arguments = ("--records", "500", "--rate", "200", "--noise", "0.2", "--json")
    one, other = (simulate(*arguments, "--seed", seed).stdout for seed in ("1", "2"))
    assert one == simulate(*arguments, "--seed", "1").stdout != other


def test_lengths_of_a_file_and_the_costs_of_an_estimate(simulate: Simulate, tmp_path: Path) -> None:
    """Two batches of 10 ms and n ms each, one after the other; the first is on its way for half a millisecond."""
    (tmp_path / "lengths").write_text("10\n" * 20)
    estimate = {"length": "tokens", "time": {"alpha_ms": 10, "beta_ms": 1}, "memory": {"c_bytes": 104857.6}}
    (tmp_path / "estimate.json").write_text(json.dumps(estimate))
    arguments = ["--lengths", "lengths", "--estimate", "estimate.json", "--memory-budget-mb", "10", "--json"]
    it = json.loads(simulate(*arguments, "--strategy", "bucketed").stdout)["strategies"]
    assert list(it) == ["bucketed"]
    assert it["bucketed"]["batches"] == 2
    assert it["bucketed"]["worker_ms"] == pytest.approx(40.0)
    assert it["bucketed"]["records_per_s"] == pytest.approx(20 / 0.0405)


def test_a_capture_arrives_by_its_timestamps(simulate: Simulate, tmp_path: Path) -> None:
    rows = [
        {"topic": "in", "partition": 0, "offset": at, "timestamp": 1_000 * at, "key": None, "value": {"t": "x" * at}}
        for at in range(1, 6)
    ]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    it = json.loads(simulate("--capture", "some.jsonl", "--field", "t", "--strategy", "fifo", "--json").stdout)
    assert it["strategies"]["fifo"]["batches"] == 5
    assert it["strategies"]["fifo"]["records_per_s"] == pytest.approx(5 / 4.025, rel=0.001)
    at_once = simulate("--capture", "some.jsonl", "--field", "t", "--strategy", "fifo", "--backlog", "--json").stdout
    assert json.loads(at_once)["strategies"]["fifo"]["batches"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lengths", "a", "--capture", "b"), "give one of them"),
        (("--field", "text"), "--field is for the records of --capture"),
        (("--rate", "5", "--backlog"), "give one of them"),
        (("--rate", "0"), "has to be above 0"),
        (("--strategy", "best"), "there are none, fifo, bucketed, exact"),
        (("--memory-budget-mb", "5"), "needs --estimate"),
        (("--alpha-ms", "0", "--beta-ms", "0", "--gamma-ms", "0", "--delta-ms", "0"), "no time at all"),
    ],
)
def test_what_does_not_go_together_is_said(simulate: Simulate, arguments: tuple[str, ...], message: str) -> None:
    assert message in simulate(*arguments, code=2).stderr


def test_a_file_that_is_not_there_is_one_sentence(simulate: Simulate) -> None:
    for option in ("--lengths", "--capture", "--estimate"):
        stderr = simulate(option, "none.json", code=1).stderr
        assert "none.json" in stderr
        assert stderr.count("\n") == 1
