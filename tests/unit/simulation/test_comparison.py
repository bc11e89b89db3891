"""Strategies side by side: what they share, how they are drawn, and the streams that are read from files."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import orjson
import pytest

from streamproc.record_lines import PlacedRecord
from streamproc.replay.capture_file import write_capture
from streamproc.runtime.cost import CostModel
from streamproc.simulation.captured import LengthsError, read_captured, read_lengths
from streamproc.simulation.comparison import STRATEGIES, Batching, by_load, compare
from streamproc.simulation.plot import BAR_WIDTH, HEIGHT, WIDTH, plot
from streamproc.simulation.simulator import Workers
from streamproc.simulation.streams import at_once, synthetic_lengths

COST = CostModel(alpha_ms=5.0, beta_ms=0.02, gamma_ms=0.002, delta_ms=2e-6, c_bytes=100)
LENGTHS = synthetic_lengths("lognormal", 1_500, 1, longest=1_024)


def test_no_strategy_beats_the_optimum_and_the_order_is_as_expected() -> None:
    found = compare(at_once(LENGTHS), Batching(64, 10, max_padded=16_384), Workers(COST), STRATEGIES)
    shares = [found.share(name) for name in ("none", "fifo", "bucketed")]
    assert shares == sorted(shares)
    assert all(found.share(name) <= 1 for name in STRATEGIES)
    data = orjson.loads(orjson.dumps(found.as_json()))
    assert data["strategies"]["none"]["batches"] == data["records"] == len(LENGTHS)


def test_a_memory_budget_limits_batches() -> None:
    """At κ = 2 a batch may have 100 · n · L ≤ 100,000."""
    tight = Batching(64, 10, memory_budget_bytes=200_000, kappa=2.0)
    found = compare(at_once([100] * 100), tight, Workers(COST), ["bucketed"])
    assert found.runs["bucketed"].batches == found.optimum.batches == 10


def test_a_line_ends_where_its_strategy_cannot_keep_up() -> None:
    batching = Batching(64, 10, max_padded=16_384)
    found = compare(at_once(LENGTHS), batching, Workers(COST), ["none", "bucketed"])
    lines = by_load(LENGTHS, found, batching, seed=1)
    assert max(load for load, _ in lines["none"]) < 0.2
    assert max(load for load, _ in lines["bucketed"]) > 0.6
    assert all(latency > 0 for line in lines.values() for _, latency in line)


def test_the_plot_has_a_bar_and_a_line_for_each_strategy_within_the_paper() -> None:
    found = compare(at_once(LENGTHS[:300]), Batching(64, 10), Workers(COST), ["fifo", "bucketed"])
    drawing = plot(found, {"fifo": [(0.1, 20.0), (0.2, 9_000.0)], "bucketed": [(0.1, 18.0), (0.9, 80.0)]}, "a < b")
    root = ET.fromstring(drawing)  # noqa: S314 - our own
    svg = "{http://www.w3.org/2000/svg}"
    texts = [it.text for it in root.iter(f"{svg}text")]
    assert {"a < b", "fifo", "bucketed", f"{found.share('bucketed'):.0%}"} <= set(texts)
    bars = [float(it.attrib["width"]) for it in root.iter(f"{svg}rect") if it.attrib["height"] == "15"]
    assert max(bars) <= BAR_WIDTH
    drawn = [it.attrib["d"] for it in root.iter(f"{svg}path") if it.attrib.get("fill") == "none"]
    assert len(drawn) == 2
    for path in drawn:
        for x, y in (map(float, point.split()) for point in path[1:].split("L")):
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT


def test_a_plot_without_a_line_says_so() -> None:
    found = compare(at_once([100]), Batching(1, 10), Workers(COST), ["none"])
    assert "no strategy can keep up" in plot(found, {"none": []}, "one")


def test_lengths_are_numbers_on_lines(tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    file.write_text("5\n\n 17 \n")
    assert read_lengths(file) == [5, 17]


@pytest.mark.parametrize(
    ("text", "message"),
    [("1\nx1\n", ":2: 'x1' is no whole number"), ("-1\n", ":1: a length is not negative"), ("\n", "no record in it")],
)
def test_what_is_no_length_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "lengths"
    file.write_text(text)
    with pytest.raises(LengthsError, match=message):
        read_lengths(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LengthsError, match="cannot be read"):
        read_lengths(tmp_path / "none")


def capture(tmp_path: Path, *rows: tuple[int, bytes | None]) -> Path:
    file = tmp_path / "some.jsonl"
    with write_capture(file) as writer:
        writer.write([PlacedRecord("in", 0, at, 1_000 + ms, None, value, []) for at, (ms, value) in enumerate(rows)])
    return file


def test_a_capture_is_a_stream_by_its_timestamps(tmp_path: Path) -> None:
    file = capture(tmp_path, (0, b'{"a":{"b":"xyz"}}'), (500, b'{"a":{"b":[1,2]}}'), (400, b'{"a":{"b":7}}'))
    it = read_captured(file, "a.b")
    assert (list(it.arrivals_s), list(it.lengths)) == ([0.0, 0.5, 0.5], [3, 2, 7])
    assert list(read_captured(file, None).lengths) == [17, 17, 13]


@pytest.mark.parametrize("value", [b'{"a":null}', b'{"a":true}', b'{"a":-1}', b"{}", b"[1]", b"no", None, b"7"])
def test_a_record_whose_field_has_no_length_is_named(tmp_path: Path, value: bytes | None) -> None:
    with pytest.raises(LengthsError, match=r"in\[0\] at offset 0: (field a is|the value is no JSON object)"):
        read_captured(capture(tmp_path, (0, value)), "a")
