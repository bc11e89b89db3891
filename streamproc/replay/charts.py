"""Small charts as SVG for a page that styles them: colours come from its classes, so that they follow light and dark.

As wide as a telephone, so that their texts are legible there. Pure functions; every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from streamproc.replay.distribution import Distribution

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 26, 30
BINS = 36
LARGEST = 1e300
"""Numbers beyond are not drawn: their differences have no number."""
LOGARITHMIC_FROM = 30
"""The least ratio of the largest to the smallest number for which an axis is logarithmic."""
TICKS = 5


class Part(NamedTuple):
    """A part of a whole: its name, how much it is, and the class of its colour."""

    name: str
    records: int
    style: str


class Curve(NamedTuple):
    """What was seen, as dots, and what a model says of it, as a line; ``style`` is the class of its colour."""

    name: str
    style: str
    dots: Sequence[tuple[float, float]]
    line: Sequence[tuple[float, float]]


class Axis(NamedTuple):
    """Where numbers stand between two ends of a line; logarithmic or linear."""

    low: float
    high: float
    is_logarithmic: bool
    start: float
    end: float

    def at(self, number: float) -> float:
        """The place of a number; one beyond the ends stands at the nearer one."""
        low, high, it = self.low, self.high, min(max(number, self.low), self.high)
        if self.is_logarithmic:
            low, high, it = math.log(low), math.log(high), math.log(it)
        return self.start + (it - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers between the ends."""
        if not self.is_logarithmic:
            step = nice_step(self.high - self.low, TICKS)
            first = math.ceil(self.low / step - 1e-9)
            return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        skip = max(1, math.ceil(len(decades) / (TICKS + 1)))
        factors = (1, 3) if len(decades) <= 3 else (1,)
        powers = [10.0**power * factor for power in decades[::skip] for factor in factors]
        return [it for it in powers if self.low <= it <= self.high]

    def edges(self, count: int) -> list[float]:
        """The edges of so many bins of one width on paper."""
        if self.is_logarithmic:
            ratio = (self.high / self.low) ** (1 / count)
            return [self.low * ratio**index for index in range(count + 1)]
        return [self.low + (self.high - self.low) * index / count for index in range(count + 1)]


def nice_step(most: float, ticks: int) -> float:
    """A round distance between ticks: 1, 2 or 5 times a power of ten."""
    raw = max(most, 1e-9) / ticks
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


def bar(parts: Sequence[Part]) -> str:
    """One bar, divided into its parts; what is there at all can be seen."""
    there = [it for it in parts if it.records]
    total = sum(it.records for it in there)
    shares = [max(it.records / total, 0.012) for it in there]
    names = ", ".join(f"{it.records:,} {it.name}" for it in there)
    drawn, x = [], 0.0
    for it, share in zip(there, shares, strict=True):
        width = share / sum(shares) * 1_000
        drawn.append(f'<rect class="fill-{it.style}" x="{x:.1f}" width="{width:.1f}" height="24"/>')
        x += width
    return (
        '<svg class="bar" viewBox="0 0 1000 24" preserveAspectRatio="none" role="img">'
        f"<title>{escape(names)}</title>{''.join(drawn)}</svg>"
    )


def distributions(title: str, unit: str, baseline: Distribution, candidate: Distribution) -> str:
    """How numbers are spread on both sides: the baseline as an area, the candidate as a line."""
    known = [it for it in (baseline, candidate) if it.weight]
    x = _axis(min(it.least for it in known), max(it.most for it in known), LEFT, WIDTH - RIGHT)
    edges = x.edges(BINS)
    shares = [
        [it.weight / side.weight if side.weight else 0.0 for it in side.histogram(edges)]
        for side in (baseline, candidate)
    ]
    y = Axis(0, max(map(max, shares)) * 100, False, HEIGHT - BOTTOM, TOP)
    parts = [*_frame(title, x, y, unit, "%")]
    for weight, side, style in zip((baseline, candidate), shares, ("area-a", "line-b"), strict=True):
        if weight.weight:
            parts.append(_steps([x.at(it) for it in edges], [y.at(share * 100) for share in side], y.at(0), style))
    return _svg(title, parts)


def drawable(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The pairs that can be drawn."""
    return [it for it in pairs if abs(it[0]) <= LARGEST and abs(it[1]) <= LARGEST]


def differences(title: str, pairs: Sequence[tuple[float, float]]) -> str:
    """A histogram of candidate - baseline, of drawable pairs."""
    sizes = [after - before for before, after in pairs]
    low, high = min(*sizes, 0.0), max(*sizes, 0.0)
    x = Axis(*_apart(low, high), False, LEFT, WIDTH - RIGHT)
    edges = x.edges(BINS)
    counts = [0] * BINS
    for it in sizes:
        counts[min(int((it - x.low) / (x.high - x.low) * BINS), BINS - 1)] += 1
    y = Axis(0, max(counts), False, HEIGHT - BOTTOM, TOP)
    parts = [*_frame(title, x, y, "candidate - baseline", "")]
    parts.append(_steps([x.at(it) for it in edges], [y.at(it) for it in counts], y.at(0), "area-b"))
    parts.append(f'<path class="zero" d="M{x.at(0):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    return _svg(title, parts)


def curves(title: str, x_label: str, y_unit: str, drawn: Sequence[Curve]) -> str:
    """Curves in one frame, each named at the end of its line."""
    every = [point for it in drawn for point in (*it.dots, *it.line)]
    x = _axis(min(it[0] for it in every), max(it[0] for it in every), LEFT, WIDTH - RIGHT)
    y = _axis(min(it[1] for it in every), max(it[1] for it in every), HEIGHT - BOTTOM, TOP)
    parts = _frame(title, x, y, x_label, y_unit)
    for it in drawn:
        if it.line:
            path = "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in it.line)
            parts.append(f'<path class="line {it.style}" d="M{path}"/>')
            end = it.line[-1]
            parts.append(_text(x.at(end[0]) - 3, y.at(end[1]) - 4, it.name, "end"))
        parts += [f'<circle class="{it.style}" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="2.2"/>' for a, b in it.dots]
    return _svg(title, parts)


def scatter(title: str, pairs: Sequence[tuple[float, float]], x_label: str = "baseline") -> str:
    """Of drawable pairs the first number to the right, the second upwards; equal ones stand on the line."""
    low, high = _apart(min(map(min, pairs)), max(map(max, pairs)))
    x = Axis(low, high, False, LEFT, WIDTH - RIGHT)
    y = Axis(low, high, False, HEIGHT - BOTTOM, TOP)
    parts = [*_frame(title, x, y, x_label, "")]
    parts.append(f'<path class="zero" d="M{x.at(low):.1f} {y.at(low):.1f}L{x.at(high):.1f} {y.at(high):.1f}"/>')
    parts += [f'<circle class="dot" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="2.5"/>' for a, b in pairs]
    return _svg(title, parts)


def number_text(number: float) -> str:
    """A number of at most four digits: 0.25, 1,234, 56k, 1.2e-05."""
    if number and abs(number) < 1e-3:
        return f"{number:.3g}"
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= factor:
            return f"{number / (1e3 if letter == 'k' else factor):.4g}{letter}"
    return f"{number:,.4g}" if abs(number) < 1_000 else f"{number:,.0f}"


def _axis(low: float, high: float, start: float, end: float) -> Axis:
    if low > 0 and high / low >= LOGARITHMIC_FROM:
        return Axis(low, high, True, start, end)
    return Axis(*_apart(min(low, 0.0) if low < high / 2 else low, high), False, start, end)


def _apart(low: float, high: float) -> tuple[float, float]:
    """Two ends of an axis that differ, whatever is on it, and by so much that floats can tell what lies between."""
    least = max(abs(low), abs(high), 1e-6) * 1e-9
    return (low, high) if high - low > least else (low - max(abs(low) * 0.1, 1e-6), high + max(abs(high) * 0.1, 1e-6))


def _frame(title: str, x: Axis, y: Axis, x_label: str, y_unit: str) -> list[str]:
    parts = [_text(LEFT, 14, title, "start", "chart-title")]
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 5, at + 4, f"{number_text(tick)}{y_unit}", "end"))
    for tick in x.ticks():
        parts.append(f'<path class="grid" d="M{x.at(tick):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(_text(x.at(tick), HEIGHT - BOTTOM + 13, number_text(tick), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, x_label, "middle"))
    return parts


def _steps(xs: Sequence[float], ys: Sequence[float], base: float, style: str) -> str:
    path = [f"M{xs[0]:.1f} {base:.1f}"]
    path += [f"V{y:.1f}H{x:.1f}" for x, y in zip(xs[1:], ys, strict=True)]
    return f'<path class="{style}" d="{"".join(path)}V{base:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "label") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, parts: Sequence[str]) -> str:
    inner = "".join(parts)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>{inner}</svg>'
