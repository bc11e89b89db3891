"""The encoder's table in docs/batching.md says what its raw figures say."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.encoder import CONTESTANTS, table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_is_made_of_the_raw_figures() -> None:
    figures = json.loads((DOCS / "encoder-benchmark.json").read_text())
    lines = table(figures)
    rows = lines[: lines.index("")]
    assert len(rows) == 2 + len(CONTESTANTS)
    assert "\n".join(rows) in (DOCS / "batching.md").read_text()
