"""The charts of the report: well-formed whatever the numbers are, with everything drawn within the frame."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.replay.charts import (
    HEIGHT,
    WIDTH,
    Axis,
    Part,
    bar,
    differences,
    distributions,
    drawable,
    nice_step,
    number_text,
    scatter,
)
from streamproc.replay.distribution import Distribution

anything = st.floats(allow_subnormal=False)
times = st.floats(-1e6, 1e12, allow_subnormal=False)


def assert_within_the_frame(svg: str) -> ET.Element:
    root = ET.fromstring(svg)  # noqa: S314 - our own
    numbers = [float(it) for path in root.iter("path") for it in re.findall(r"-?[0-9.]+", path.attrib["d"])]
    numbers += [float(it.attrib[name]) for it in root.iter("circle") for name in ("cx", "cy")]
    assert all(-0.1 <= it <= max(WIDTH, HEIGHT) + 0.1 for it in numbers)
    assert "nan" not in svg.lower().replace("nano", "")
    return root


@given(st.lists(st.tuples(anything, anything), min_size=1, max_size=30))
def test_pairs_of_any_numbers_that_can_be_drawn_are(pairs: list[tuple[float, float]]) -> None:
    able = drawable(pairs)
    if able:
        assert_within_the_frame(differences("sizes", able))
        assert len(list(assert_within_the_frame(scatter("both", able)).iter("circle"))) == len(able)


@given(st.lists(times, max_size=30), st.lists(times, min_size=1, max_size=30))
def test_distributions_of_any_numbers_are_drawn(first: list[float], second: list[float]) -> None:
    sides = (Distribution(), Distribution())
    for side, values in zip(sides, (first, second), strict=True):
        for value in values:
            side.add(value)
    root = assert_within_the_frame(distributions("a <title>", "ms", *sides))
    drawn = [it.attrib["class"] for it in root.iter("path") if it.attrib["class"] in ("area-a", "line-b")]
    assert drawn == [name for name, values in (("area-a", first), ("line-b", second)) if values]
    assert "a <title>" in [it.text for it in root.iter("text")]


def test_a_wide_spread_is_drawn_by_magnitude() -> None:
    axis = Axis(1, 1_000, True, 0, 300)
    assert [axis.at(it) for it in (1, 10, 100, 1_000)] == pytest.approx([0, 100, 200, 300])
    assert axis.ticks() == [1, 10, 100, 1_000]


def test_each_verdict_that_is_there_can_be_seen_in_the_bar() -> None:
    root = ET.fromstring(bar([Part("equal", 1_000_000, "equal"), Part("close", 0, "close"), Part("changed", 1, "c")]))  # noqa: S314 - our own
    widths = {it.attrib["class"]: float(it.attrib["width"]) for it in root.iter("rect")}
    assert widths.keys() == {"fill-equal", "fill-c"}
    assert widths["fill-c"] > 10
    assert sum(widths.values()) == pytest.approx(1_000, abs=0.2)


@given(st.floats(1e-9, 1e12), st.integers(1, 10))
def test_ticks_are_round_and_not_too_many(most: float, ticks: int) -> None:
    step = nice_step(most, ticks)
    assert most / step <= ticks * 1.0001
    assert f"{step:e}"[0] in "125"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (0.25, "0.25"), (1234.0, "1,234"), (56_000.0, "56k"), (0.0000123, "1.23e-05"), (-2.5e6, "-2.5M")],
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert number_text(number) == text
