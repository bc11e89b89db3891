"""What a comparison shows, as one SVG: throughput and padding as bars, latency against load as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from streamproc.replay.charts import nice_step, number_text
from streamproc.simulation.comparison import Comparison, Strategy

COLOURS: dict[Strategy, str] = {"none": "#8250df", "fifo": "#d29922", "bucketed": "#1f6feb", "exact": "#2da44e"}
WIDTH, HEIGHT = 760, 420
BAR_LEFT, BAR_WIDTH = 90, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 150, 48
MOST_OF_LEAST = 20
"""The latency axis ends at this many times the least latency: above it a strategy is overloaded."""


def plot(comparison: Comparison, lines: Mapping[Strategy, Sequence[tuple[float, float]]], title: str) -> str:
    """The drawing; ``lines`` are from ``by_load``."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(20, 22, title, "start", size=14),
        _text(BAR_LEFT, 42, "time of the optimum over its own", "start"),
        _text(BAR_LEFT + BAR_WIDTH + 130, 42, "padding", "start"),
    ]
    for row, strategy in enumerate(comparison.runs):
        y, run, share = 50 + row * 20, comparison.runs[strategy], comparison.share(strategy)
        length = share * BAR_WIDTH
        x = BAR_LEFT + BAR_WIDTH + 130
        parts += [
            _text(BAR_LEFT - 8, y + 12, strategy, "end", colour=COLOURS[strategy]),
            f'<rect x="{BAR_LEFT}" y="{y}" width="{length:.1f}" height="15" fill="{COLOURS[strategy]}"/>',
            _text(BAR_LEFT + length + 6, y + 12, f"{share:.0%}", "start"),
            f'<rect x="{x}" y="{y}" width="{60 / run.padding_ratio:.1f}" height="15" fill="{COLOURS[strategy]}"/>',
            f'<rect x="{x}" y="{y}" width="60" height="15" fill="none" stroke="#d0d7de"/>',
            _text(x + 66, y + 12, f"× {number_text(run.padding_ratio)}", "start"),
        ]
    return "\n".join([*parts, *_latencies(lines), "</svg>"]) + "\n"


def _latencies(lines: Mapping[Strategy, Sequence[tuple[float, float]]]) -> list[str]:
    points = [latency for line in lines.values() for _, latency in line]
    if not points:
        return [_text(WIDTH / 2, HEIGHT / 2, "no strategy can keep up with any load", "middle")]
    most = min(max(points), MOST_OF_LEAST * min(points))
    step = nice_step(most, 5)
    top = (int(most / step) + 1) * step

    def at(load: float, latency: float) -> tuple[float, float]:
        return (
            LEFT + load * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - min(latency, top) / top * (HEIGHT - TOP - BOTTOM),
        )

    parts = [
        _text(20, TOP - 10, "p99 of the latency, ms", "start"),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "arrivals, of what the optimum could do", "middle"),
    ]
    for number in range(round(top / step) + 1):
        (x, y), (end, _) = at(0, number * step), at(1, 0)
        parts += [
            f'<path d="M{x:.1f} {y:.1f}H{end:.1f}" stroke="#d0d7de"/>',
            _text(x - 8, y + 4, number_text(number * step), "end"),
        ]
    for number in range(0, 11, 2):
        x, y = at(number / 10, 0)
        parts.append(_text(x, y + 18, f"{number * 10} %", "middle"))
    for strategy, line in lines.items():
        if line:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in line))
            parts.append(f'<path d="M{path}" fill="none" stroke="{COLOURS[strategy]}" stroke-width="1.8"/>')
    return parts


def _text(x: float, y: float, text: str, anchor: str, *, size: int = 12, colour: str = "#1f2328") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"
