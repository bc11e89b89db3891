"""The targets on a few hundred inputs, the same in every run; ``make fuzz`` is the long run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.run import Summary, main
from tests.fuzz.take import Take, mutated
from tests.fuzz.targets import NAMES, target


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_found_in_a_short_run(name: str) -> None:
    check, seeds = target(name)
    for data in seeds:
        check(data)

    @given(st.binary(max_size=500) | st.builds(bytes.__add__, st.sampled_from(seeds), st.binary(max_size=200)))
    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    def run(data: bytes) -> None:
        check(data)

    run()


@given(st.binary(max_size=40), st.binary(max_size=40))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_taking_never_fails_however_few_bytes_there_are(data: bytes, changed: bytes) -> None:
    take = Take(data)
    while take.left:
        assert 0 <= take.below(300) < 300
        assert -(2**63) <= take.int64() < 2**63
        assert len(take.blob(9)) <= 9
    assert (take.byte(), take.rest(), take.one_of("ab")) == (0, b"", "a")
    assert len(mutated(changed, Take(data))) <= len(changed) + 4 * 16


def test_a_run_is_summed_up_from_what_libfuzzer_says(tmp_path: Path) -> None:
    summary = Summary("wire", seed=1)
    summary.read("#8192\tpulse  cov: 312 ft: 1404 corp: 77/12Kb lim: 80 exec/s: 4096 rss: 80Mb\n")
    assert (summary.executions, summary.coverage, summary.corpus, summary.found) == (8192, 312, 77, None)
    summary.read("stat::number_of_executed_units: 9001\n")
    assert summary.executions == 9001
    summary.read(f"artifact_prefix='x'; Test unit written to {tmp_path}/timeout-abc\n")
    assert summary.found == f"{tmp_path}/timeout-abc"
    assert summary.replay == f"python -m tests.fuzz.run --target wire --input {tmp_path}/timeout-abc"


def test_a_saved_input_is_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "crash-abc"
    saved.write_bytes(b"\0\2" + bytes(200))
    assert main(["--target", "wire", "--input", str(saved)]) == 0
    assert "passes" in capsys.readouterr().out
