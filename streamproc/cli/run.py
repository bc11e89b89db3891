"""``streamproc run``: the processor and its sidecar, until it is told to stop."""

from __future__ import annotations

import os

import typer

from streamproc.cli.terminal import ConfigOption

app = typer.Typer()


@app.command(epilog="Example: streamproc run -c streamproc.yaml")
def run(config: ConfigOption = None) -> None:
    """Run the processor and its HTTP sidecar until SIGTERM or Ctrl-C, which let records in flight finish.

    SIGHUP, or `streamproc reload`, brings a new version of backend and settings into force without a restart.

    The environment overrides the settings file: STREAMPROC_KAFKA__BOOTSTRAP_SERVERS=kafka:9092.
    """
    from streamproc.runtime.cycles import look_for_cycles_seldom  # noqa: PLC0415 - as below
    from streamproc.runtime.heap import keep_freed_memory  # noqa: PLC0415 - as below

    look_for_cycles_seldom()  # before the imports, which make what lasts
    keep_freed_memory()
    from streamproc.runtime.app import run_app  # noqa: PLC0415 - imports the whole data path
    from streamproc.settings_loading import load_settings  # noqa: PLC0415 - as above

    raise SystemExit(run_app(lambda: load_settings(config, os.environ)))
