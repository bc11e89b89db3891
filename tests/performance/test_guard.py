"""What a record costs, stage by stage, against the figures kept in benchmarks/guard.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.guard import ACCEPT, FIGURES, LARGE_RECORDS, Tally, grown, module_of, run_processor
from benchmarks.workloads import small_value

ROOT = Path(__file__).parents[2]
KEPT = json.loads(FIGURES.read_text())
MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"

# A fifth more in the worker for each record, written as if it stood in the worker's file; three instructions a turn.
PLANTED = """
import sys
from benchmarks import guard
from streamproc.runtime import worker

source = '''
def planted(original):
    def run(self, spans, *arguments):
        for _ in range(round(sum([count for _, _, count in spans]) * MORE / 3)):
            pass
        return original(self, spans, *arguments)
    return run
'''
space = {"MORE": float(sys.argv[1])}
exec(compile(source, worker.__file__, "exec"), space)
worker.TaskRunner.run = space["planted"](worker.TaskRunner.run)
sys.exit(guard.main([]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(KEPT["python"] != MINOR, reason=f"instructions are those of Python {KEPT['python']}")
def test_no_stage_does_more_for_a_record_than_it_did() -> None:
    done = run("-m", "benchmarks.guard")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(KEPT["python"] != MINOR, reason=f"instructions are those of Python {KEPT['python']}")
def test_a_fifth_more_in_one_stage_is_found_and_the_stage_is_named() -> None:
    done = run("-c", PLANTED, str(0.2 * KEPT["figures"]["runtime/worker"]["instructions"]))
    assert done.returncode == 1, done.stdout + done.stderr
    first, *others = done.stdout.splitlines()
    assert first.startswith("runtime/worker: instructions a record went from")
    assert first.endswith("(+20%)")
    assert others == [ACCEPT]


def test_only_what_grew_by_more_than_it_may_is_told_of() -> None:
    kept = {"a": {"instructions": 100.0, "c_calls": 0.01}, "b": {"instructions": 10.0}}
    assert grown(kept, kept) == []
    assert grown(kept, {"a": {"instructions": 114.9, "c_calls": 0.04}, "b": {"instructions": 1.0}}) == []
    assert grown(kept, {"a": {"instructions": 120.0}}) == ["a: instructions a record went from 100 to 120 (+20%)"]
    assert grown(kept, {"new": {"c_calls": 1.0}}) == ["new: c calls a record went from 0 to 1 (new)"]


def test_two_runs_count_the_same() -> None:
    """But for a few: times that were measured are longer or shorter as text."""
    counted = []
    for _ in range(2):
        tally = Tally()
        run_processor(LARGE_RECORDS, small_value, tally)
        counted.append(tally.by_module())
    first, second = counted
    assert first.keys() == second.keys()
    for module, counts in first.items():
        assert counts == pytest.approx(second[module], rel=0.01, abs=50), module
    assert {"runtime/source", "runtime/ledger", "runtime/worker", "runtime/sink"} <= set(counted[0])
    assert not any(module.startswith("broker/memory") for module in counted[0])


def test_code_belongs_to_the_file_that_it_stands_in() -> None:
    assert module_of(compile("1", str(ROOT / "streamproc/runtime/ledger.py"), "exec")) == "runtime/ledger"
    assert module_of(compile("1", "/elsewhere/streamproc.py", "exec")) == ""
