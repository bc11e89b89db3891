"""The charts of the measurements: every point is on the paper, and the axes reach the largest."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree as ET

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, line_chart

SVG = "{http://www.w3.org/2000/svg}"
coordinates = st.floats(0, 1e9, allow_subnormal=False)


@given(st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=30), st.text(max_size=20), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_point_is_drawn_within_the_axes(points: list[tuple[float, float]], name: str, log_x: bool) -> None:
    name = "".join(it for it in name if it.isprintable())
    if log_x:
        points = [(x + 1, y) for x, y in points]
    chart = line_chart("memory <over> time", "x", "y", [Line(name, points)], log_x=log_x)
    root = ET.fromstring(chart)  # noqa: S314 - our own
    (drawn,) = [it.attrib["d"] for it in root.iter(f"{SVG}path") if it.attrib.get("fill") == "none"]
    found = [tuple(map(float, it)) for it in re.findall(r"(-?[0-9.]+) (-?[0-9.]+)", drawn)]
    assert len(found) == len(points)
    assert all(LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1 and TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1 for x, y in found)
    assert name in [it.text or "" for it in root.iter(f"{SVG}text")]


def test_a_logarithmic_axis_gives_every_power_the_same_room() -> None:
    chart = line_chart("t", "x", "y", [Line("l", [(10, 1), (100, 1), (1_000, 1), (10_000, 1)])], log_x=True)
    drawn = re.search(r'd="M([^"]*)" fill="none"', chart)
    assert drawn is not None
    xs = [float(it) for it in re.findall(r"(-?[0-9.]+) -?[0-9.]+", drawn[1])]
    assert [round(right - left, 0) for left, right in pairwise(xs)] == [round((WIDTH - LEFT - RIGHT) / 3, 0)] * 3
