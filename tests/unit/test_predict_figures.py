"""The table of predictions in docs/http.md says what its raw figures say."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.predict import table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_is_made_of_the_raw_figures() -> None:
    figures = json.loads((DOCS / "predict-benchmark.json").read_text())
    lines = table(figures)
    assert len(lines) == 2 + 4
    assert "\n".join(lines) in (DOCS / "http.md").read_text()
    assert all(it[state]["count"] > 50 for it in figures["found"] for state in ("idle", "streaming"))
