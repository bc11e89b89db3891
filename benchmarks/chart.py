"""A line chart as SVG: one function, since a library for plots would be the largest thing that the tools install."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def line_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], *, log_x: bool = False) -> str:
    """The chart; both axes begin at zero, or the one to the right at the least value, where it is logarithmic."""
    xs = [x for line in lines for x, _ in line.points]
    y_step = nice_step(max(y for line in lines for _, y in line.points), TICKS)
    y_max = _end(max(y for line in lines for _, y in line.points), y_step)
    x_ticks = _powers(min(xs), max(xs)) if log_x else _steps(max(xs))
    scale: Callable[[float], float] = math.log if log_x else float
    x_min, x_max = scale(x_ticks[0]), scale(x_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (scale(x) - x_min) / (x_max - x_min) * (WIDTH - LEFT - RIGHT),
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
        (x, y), (end, _) = at(x_ticks[0], number * y_step), at(x_ticks[-1], 0)
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{end:.1f}" stroke="#d0d7de"/>')
        parts.append(_text(x - 8, y + 4, f"{number * y_step:g}", anchor="end"))
    for tick in x_ticks:
        x, y = at(tick, 0)
        parts.append(_text(x, y + 18, f"{tick:g}"))
    for line, colour in zip(lines, COLOURS, strict=False):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in line.points))
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        _, y = at(*line.points[-1])
        parts.append(_text(WIDTH - RIGHT + 8, y + 4, line.name, anchor="start", colour=colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _steps(most: float) -> list[float]:
    step = nice_step(most, TICKS)
    return [number * step for number in range(round(_end(most, step) / step) + 1)]


def _powers(least: float, most: float) -> list[float]:
    """Powers of ten, or of two where there would be few, from the least value or below it to the most or above it."""
    base = 10 if most / least >= 1_000 else 2
    first, last = math.floor(math.log(least, base) + 1e-9), math.ceil(math.log(most, base) - 1e-9)
    return [float(base) ** power for power in range(first, max(last, first + 1) + 1)]


def _end(most: float, step: float) -> float:
    return max(math.ceil(most / step), 1) * step


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12, colour: str = "#1f2328") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"
