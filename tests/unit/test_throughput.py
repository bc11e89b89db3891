"""The benchmark's bookkeeping: a wrong result is found, a figure is the median of its runs, a failure is shown."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.environments import REQUIREMENTS
from benchmarks.kafka_run import ContestantError, Measured, read_report, run_process, tick
from benchmarks.peers.work import WORKS, Meter, Task, usage
from benchmarks.throughput import RUN_S, chosen, nearest_size
from benchmarks.throughput_report import (
    BEGIN,
    CONTESTANTS,
    END,
    Results,
    markdown,
    plot,
    replace_table,
    rows,
    spread,
    targets,
)
from benchmarks.workloads import IMAGE_BYTES, LARGE_BYTES, SMALL_BYTES, WORKLOADS, Workload
from tests.support.asyncs import wait_until
from tests.unit.test_chart import SVG

CONDITIONS = {
    "taken": "2030-01-02",
    "commit": "abc",
    "cpu": "a processor",
    "cores": 2,
    "python": "3.11",
    "kafka": "4",
    "rounds": 5,
    "batch": 512,
}
EVERY = [*WORKLOADS.values()]
positive = st.floats(1e-6, 1e6)
runs = st.builds(Measured, st.integers(1, 10**7), positive, positive, positive)


def results_of(rates: dict[str, float], workload: str = "json-223") -> Results:
    results = Results(CONDITIONS)
    for name, rate in rates.items():
        results.add(workload, name, Measured(1_000, 1_000 / rate, 0.004, 0.006))
    return results


@pytest.mark.parametrize("workload", EVERY, ids=lambda it: it.name)
@pytest.mark.parametrize("number", [0, 7, 99, 12_345])
def test_what_the_work_makes_of_a_record_passes_the_check(workload: Workload, number: int) -> None:
    (alone, _) = WORKS[workload.work].batch([workload.value(number), workload.value(number + 1)])
    assert workload.check(alone, is_wrapped=False) == number
    assert workload.check(WORKS[workload.work].one(workload.value(number)), is_wrapped=False) == number


@pytest.mark.parametrize("workload", [it for it in EVERY if it.is_json], ids=lambda it: it.name)
def test_a_result_in_its_envelope_passes_the_check(workload: Workload) -> None:
    result = WORKS[workload.work].one(workload.value(5))
    assert workload.check(b'{"result":' + result + b',"metrics":{}}', is_wrapped=True) == 5


@pytest.mark.parametrize("workload", EVERY, ids=lambda it: it.name)
def test_another_records_content_under_a_records_number_is_found(workload: Workload) -> None:
    one, other = WORKS[workload.work].one(workload.value(1)), WORKS[workload.work].one(workload.value(2))
    forged = orjson.dumps({**orjson.loads(other), "id": 1}) if workload.is_json else one[:8] + other[8:]
    with pytest.raises(AssertionError):
        workload.check(forged, is_wrapped=False)


def test_the_input_is_no_result_of_the_doubling() -> None:
    with pytest.raises(AssertionError):
        WORKLOADS["numpy"].check(WORKLOADS["numpy"].value(3), is_wrapped=False)


@pytest.mark.parametrize(
    ("name", "size"), [("json-223", SMALL_BYTES), ("json-10k", LARGE_BYTES), ("image-150k", IMAGE_BYTES)]
)
def test_records_are_as_large_as_they_are_called(name: str, size: int) -> None:
    assert {len(WORKLOADS[name].value(number)) for number in (0, 1, 10, 999, 30_000)} == {size}


@given(st.lists(st.integers(0, 9), max_size=20))
@settings(max_examples=100, deadline=None)
def test_results_are_ticked_off_once_each(numbers: list[int]) -> None:
    workload, seen = WORKLOADS["json-223"], bytearray(8)
    values = [workload.value(number) for number in numbers]
    if len(set(numbers)) == len(numbers) and all(number < 8 for number in numbers):
        tick(values, seen, workload, is_wrapped=False)
        assert [index for index, count in enumerate(seen) if count] == sorted(numbers)
    else:
        with pytest.raises(ContestantError, match="one too many"):
            tick(values, seen, workload, is_wrapped=False)


@pytest.mark.parametrize("value", [None, b"", b"[]", b'{"id":1', b'{"id":"x"}', b'{"result":{"id":1}}'])
def test_what_is_no_result_at_all_is_found(value: bytes | None) -> None:
    with pytest.raises(ContestantError, match="not what it has to be"):
        tick([value], bytearray(8), WORKLOADS["json-223"], is_wrapped=False)


@given(st.lists(positive, min_size=1, max_size=9))
def test_a_spread_is_the_median_between_its_ends(numbers: list[float]) -> None:
    it = spread(numbers)
    assert it.least <= it.median <= it.most
    assert it == (statistics.median(numbers), min(numbers), max(numbers))


@given(st.lists(runs, min_size=1, max_size=5), st.lists(runs, min_size=1, max_size=5))
def test_a_ratio_is_that_of_the_medians(bare: list[Measured], ours: list[Measured]) -> None:
    results = Results(CONDITIONS)
    for name, its in (("bare", bare), ("streamproc-2", ours)):
        for run in its:
            results.add("json-223", name, run)
    wanted = statistics.median(it.records / it.wall_s for it in ours) / statistics.median(
        it.records / it.wall_s for it in bare
    )
    (_, row) = rows(results, "json-223")
    assert float(row.cells[1]) == pytest.approx(wanted, rel=0.06)
    assert targets(results)[0].seen == pytest.approx(wanted)
    assert Results.from_json(orjson.loads(orjson.dumps(results.as_json()))) == results


def test_targets_are_met_at_their_limits_and_missed_beyond() -> None:
    rates = {"bare": 100.0, "streamproc-1": 40.0, "streamproc-2": 65.0, "quixstreams": 26.1, "arroyo": 1.0}
    rates |= {"arroyo-processes": 6.5, "faust": 7.0, "faststream": 6.0, "streamproc-none": 69.0}
    found = targets(results_of(rates))
    assert [it.verdict for it in found[:5]] == ["met", "met", "met", "missed", "missed"]
    assert [it.verdict for it in found[5:-1]] == ["met", "met", "met", "missed", "met"]
    assert found[-1].verdict == "met"
    assert found[1].seen == pytest.approx(10)


def test_who_writes_no_envelope_has_targets_of_its_own() -> None:
    found = targets(results_of({"bare": 100.0, "streamproc-none": 70.0}))
    assert [it.verdict for it in found[5:6]] == ["met"]
    assert {it.verdict for it in (*found[:5], *found[6:])} == {"not measured"}


def test_another_workload_has_no_targets() -> None:
    results = results_of({"bare": 100.0}, "numpy")
    assert targets(results) == []
    assert "targets" not in markdown(results)


def test_who_has_no_figure_is_not_measured_rather_than_met() -> None:
    assert {it.verdict for it in targets(results_of({"bare": 1.0}))} == {"not measured"}


def test_a_contestant_that_failed_is_in_the_table_with_its_error() -> None:
    results = results_of({"bare": 100.0, "arroyo": 50.0})
    results.fail("json-223", "faust", "was not done after 120 s")
    results.fail("json-223", "arroyo", "wrote 3 of 4 results")
    table = markdown(results)
    assert "| Faust, take | failed |" in table
    assert "Faust, take: was not done after 120 s" in table
    assert "arroyo, RunTask: 1 of 2 runs failed: wrote 3 of 4 results" in table
    texts = [it.text for it in ET.fromstring(plot(results)).iter(f"{SVG}text")]  # noqa: S314 - our own
    assert "failed" in texts


def test_every_run_has_a_bar_of_its_ratios_length() -> None:
    results = results_of({"bare": 100.0, "confluent": 200.0, "streamproc-2": 50.0})
    bars = [float(it.attrib["width"]) for it in ET.fromstring(plot(results)).iter(f"{SVG}rect")][1:]  # noqa: S314 - our own
    assert bars == pytest.approx([210, 420, 105])


def test_the_table_stands_between_its_marks_and_nothing_else_changes() -> None:
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_table(document, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="no place"):
        replace_table("before", "new")


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=5, unique=True).map(sorted), st.floats(1, 1e7))
def test_no_other_size_takes_a_time_nearer_to_the_wanted_one(sizes: list[int], rate: float) -> None:
    def off(size: int) -> float:
        took = size / rate
        return max(took / RUN_S, RUN_S / took)

    assert off(nearest_size(sizes, rate)) == pytest.approx(min(map(off, sizes)))


def test_the_bare_loop_always_takes_part() -> None:
    assert [it.name for it in chosen(["faust"])] == ["bare", "faust"]
    assert all(it.is_default for it in chosen(None))


def test_a_contestants_report_is_read_behind_whatever_else_it_writes() -> None:
    out = 'hello\n{"wall_s": 2.0, "own_cpu_s": 1.0, "tree_cpu_s": 3.0}\nbye\n'
    it = read_report(out, "", 0, 1_000_000)
    assert (it.rate, it.own_us, it.tree_us) == (500_000, 1, 3)


@pytest.mark.parametrize(
    ("out", "err", "code", "told"),
    [
        ("", "Traceback\nKeyError: 'x'\n", 1, "exit code 1: KeyError: 'x'"),
        ('{"wall_s": 1, "own_cpu_s": 1, "tree_cpu_s": 1}', "crashed", -9, "exit code -9: crashed"),
        ("", "", 0, "exit code 0: nothing was said"),
    ],
)
def test_a_contestant_without_a_report_has_failed(out: str, err: str, code: int, told: str) -> None:
    with pytest.raises(ContestantError, match=told):
        read_report(out, err, code, 1)


def task() -> Task:
    return Task("", "", "", "", 10, "json", 1, "")


def test_a_contestant_that_takes_too_long_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    note = tmp_path / "child"
    program = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(ContestantError, match="was not done after 2 s"):
        run_process([sys.executable, "-c", program], task(), limit_s=2)
    child = Path(f"/proc/{note.read_text()}/stat")

    def is_gone() -> bool:
        try:
            return child.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_until(is_gone, "the process that the contestant left has ended")


def test_a_meter_counts_the_cpu_of_the_processes_below(capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter()
    meter.begin()
    burn = "import time\nwhile time.process_time() < 0.25: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        meter.end()
        child.communicate(b"\n")
    alive = orjson.loads(capsys.readouterr().out)
    meter.end()
    dead = orjson.loads(capsys.readouterr().out)
    assert alive["tree_cpu_s"] - alive["own_cpu_s"] >= 0.18
    assert dead["tree_cpu_s"] - dead["own_cpu_s"] >= 0.18


def test_a_measurement_has_a_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="not begun"):
        Meter().end()
    meter = Meter()
    meter.begin()
    first = meter.begun
    meter.begin()
    assert meter.begun is first
    meter.end(share=0.5)
    assert usage().clock_s - first.clock_s > 0 if first else False
    assert orjson.loads(capsys.readouterr().out)["wall_s"] > 0


@pytest.mark.parametrize("name", [it.name for it in CONTESTANTS])
def test_every_contestant_has_a_module_and_pinned_requirements(name: str) -> None:
    (contestant,) = [it for it in CONTESTANTS if it.name == name]
    assert Path(*contestant.module.split(".")).with_suffix(".py").exists()
    if contestant.peer is not None:
        lines = (REQUIREMENTS / f"{contestant.peer}.txt").read_text().splitlines()
        assert all("==" in line for line in lines)
        assert {"numpy", "orjson"} <= {line.partition("==")[0] for line in lines}


def test_all_contestants_use_the_same_json_and_array_libraries() -> None:
    pins: dict[str, set[str]] = {"numpy": set(), "orjson": set()}
    for file in REQUIREMENTS.glob("*.txt"):
        for line in file.read_text().splitlines():
            name, _, version = line.partition("==")
            if name in pins:
                pins[name].add(version)
    assert all(len(versions) == 1 for versions in pins.values()), pins


def test_the_documents_table_is_the_kept_runs() -> None:
    docs = Path(__file__).parents[2] / "docs"
    (document,) = [it for it in docs.glob("performance*.md") if BEGIN in it.read_text(encoding="utf-8")]
    kept = orjson.loads((docs / "performance" / "throughput.json").read_bytes())
    text = document.read_text(encoding="utf-8")
    assert replace_table(text, markdown(Results.from_json(kept))) == text
