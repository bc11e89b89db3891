"""``streamproc replay run``: a capture into topics, or straight through a backend."""

from __future__ import annotations

import typer

app = typer.Typer()
