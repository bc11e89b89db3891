"""A line chart as SVG: one function, since a library for plots would be the largest thing that the tools install."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from streamproc.replay.charts import nice_step

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 130, 44, 48
COLOURS = ("#1f6feb", "#d29922", "#2da44e", "#8250df")
TICKS = 6


@dataclass(frozen=True, slots=True)
class Line:
    """A line with a name, through points in the order of their first coordinate."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """The chart; both axes begin at zero."""
    x_step = nice_step(max(x for line in lines for x, _ in line.points), TICKS)
    y_step = nice_step(max(y for line in lines for _, y in line.points), TICKS)
    x_max = _end(max(x for line in lines for x, _ in line.points), x_step)
    y_max = _end(max(y for line in lines for _, y in line.points), y_step)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x / x_max * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y / y_max * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 24, title, anchor="start", size=14),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label),
        _text(LEFT, TOP - 8, y_label, anchor="end"),
    ]
    for number in range(round(y_max / y_step) + 1):
        (x, y), (end, _) = at(0, number * y_step), at(x_max, 0)
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{end:.1f}" stroke="#d0d7de"/>')
        parts.append(_text(x - 8, y + 4, f"{number * y_step:g}", anchor="end"))
    for number in range(round(x_max / x_step) + 1):
        x, y = at(number * x_step, 0)
        parts.append(_text(x, y + 18, f"{number * x_step:g}"))
    for line, colour in zip(lines, COLOURS, strict=False):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in line.points))
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        _, y = at(*line.points[-1])
        parts.append(_text(WIDTH - RIGHT + 8, y + 4, line.name, anchor="start", colour=colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _end(most: float, step: float) -> float:
    return max(math.ceil(most / step), 1) * step


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12, colour: str = "#1f2328") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"
