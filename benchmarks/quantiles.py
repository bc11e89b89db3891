"""Quantiles by nearest rank: every one of them is a value that was measured, and none is between two."""

from __future__ import annotations

import math
from collections.abc import Sequence


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest of these, which are in ascending order, that at least ``share`` of them do not exceed."""
    if not ordered:
        raise ValueError("there is no quantile of nothing")
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def summary_ms(latencies_ms: Sequence[float]) -> dict[str, float]:
    """Count, median, p99, p99.9 and the longest."""
    ordered = sorted(latencies_ms)
    return {
        "count": len(ordered),
        "p50_ms": round(quantile(ordered, 0.5), 2),
        "p99_ms": round(quantile(ordered, 0.99), 2),
        "p999_ms": round(quantile(ordered, 0.999), 2),
        "max_ms": round(ordered[-1], 2),
    }
