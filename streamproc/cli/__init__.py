"""The command ``streamproc``: one file a command group, each imported when its command is called.

Invariants:

- ``streamproc --help`` imports neither a command's module nor a Kafka client, pydantic or a backend.
- What a user can cause ends as one sentence on standard error and an exit code: 2 for settings and usage, 1 for all
  else, 130 for Ctrl-C. A traceback appears only with ``--debug`` or ``STREAMPROC_DEBUG=1``.
- Standard output carries what a script would read, and nothing else.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """The console entry point."""
    end_at_once_when_told()
    # Typer takes 80 ms to import: what imports only the package does not pay for it.
    from streamproc.cli.root import command  # noqa: PLC0415

    command()(prog_name="streamproc")


def end_at_once_when_told() -> None:
    """Until a command takes over, SIGINT and SIGTERM end the process without a word: there is nothing to clean up.

    As exceptions they would come out of whatever is just being imported, in whatever that makes of them. And the first
    process of a container is not ended by a SIGTERM that it does not handle.
    """
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        # One that is ignored, as under nohup, stays so.
        if signal.getsignal(number) == default:
            signal.signal(number, lambda it, _: os._exit(128 + it))
