"""``streamproc stats``: the statistics of the whole fleet, from the metrics topics, until it is told to stop."""

from __future__ import annotations

import os

import typer

from streamproc.cli.terminal import ConfigOption

app = typer.Typer()


@app.command(epilog="Example: streamproc stats -c streamproc.yaml, then curl 'localhost:8090/stats?window=1m'")
def stats(config: ConfigOption = None) -> None:
    """Keep statistics of all replicas, from the tasks' metrics topics, until SIGTERM or Ctrl-C.

    Windows of 10 seconds, a minute and an hour: records, batches, failures by cause, the times of each step with their
    quantiles, fill, padding, what was predicted against what was seen. They are served as JSON over HTTP; those that
    have closed are written to the topic of stats.topic. What is counted survives the process, kill -9 included.
    """
    from streamproc.settings_loading import load_settings  # noqa: PLC0415 - --help needs neither it nor Faust
    from streamproc.stats.run import run_stats  # noqa: PLC0415 - as above

    raise SystemExit(run_stats(load_settings(config, os.environ)))
