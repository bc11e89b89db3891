"""``streamproc replay``: yesterday's stream against tomorrow's model; each command in a file of its own."""

from __future__ import annotations

import typer

from streamproc.cli import replay_capture, replay_diff, replay_golden, replay_run, replay_shadow

app = typer.Typer(no_args_is_help=True)


@app.callback(epilog="Example: streamproc replay capture orders --last 100000 -o orders.jsonl.gz")
def replay() -> None:
    """Capture records of topics into a file, replay them, and compare what came of it."""


# In the order in which they are used.
app.add_typer(replay_capture.app)
app.add_typer(replay_run.app)
app.add_typer(replay_diff.app)
app.add_typer(replay_shadow.app)
app.add_typer(replay_golden.app)
