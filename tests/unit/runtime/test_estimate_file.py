"""The file of an estimate."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamproc.errors import EstimateError
from streamproc.runtime.cost import CostModel
from streamproc.runtime.estimate_file import (
    Estimate,
    MemoryCoefficients,
    TimeCoefficients,
    read_estimate,
    write_estimate,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    estimate = Estimate(
        length="tokens",
        fingerprint={"device": "cpu"},
        time=TimeCoefficients(alpha_ms=5, delta_ms=1e-6),
        memory=MemoryCoefficients(a_bytes=100, d_bytes=3),
        kappa=1.2,
        max_size=32,
    )
    write_estimate(tmp_path / "it.json", estimate)
    assert read_estimate(tmp_path / "it.json") == estimate
    assert estimate.cost == CostModel(5, delta_ms=1e-6, a_bytes=100, d_bytes=3)


def test_memory_may_be_unknown() -> None:
    assert Estimate(length="bytes", time=TimeCoefficients(alpha_ms=1)).cost == CostModel(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no", "Invalid JSON"),
        ('{"length":"bytes"}', "time: Field required"),
        ('{"length":"bytes","time":{"alpha_ms":-1}}', "time.alpha_ms: Input should be greater"),
        ('{"length":"bytes","time":{"alpha_ms":0}}', "no time at all"),
        ('{"length":"bytes","time":{"alpha_ms":1},"kappa":0.5}', "kappa: Input should be greater"),
        ('{"length":"bytes","time":{"alpha_ms":1},"version":2}', "version: Input should be 1"),
    ],
)
def test_what_is_no_estimate_is_refused_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "it.json").write_text(text)
    with pytest.raises(EstimateError, match=message) as caught:
        read_estimate(tmp_path / "it.json")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(EstimateError, match=r"none\.json: cannot be read"):
        read_estimate(tmp_path / "none.json")
    with pytest.raises(EstimateError, match="cannot be written"):
        write_estimate(tmp_path / "no" / "it.json", Estimate(length="bytes", time=TimeCoefficients(alpha_ms=1)))
