"""The files that a document shows: each a fenced block behind a line that has nothing but its name."""

from __future__ import annotations

import re
from pathlib import Path

_FILE = re.compile(r"^`([\w./-]+)`:\n\n```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def files_of(document: Path) -> dict[str, str]:
    """Their texts by their names, in the document's order."""
    found = _FILE.findall(document.read_text(encoding="utf-8"))
    assert len({name for name, _ in found}) == len(found), f"{document} shows a file twice"
    return dict(found)


def write_files(document: Path, folder: Path) -> None:
    """Write them all."""
    for name, text in files_of(document).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
