"""The command ``streamproc``: one file a command group, each imported when its command is called.

Invariants:

- ``streamproc --help`` imports neither a command's module nor a Kafka client, pydantic or a backend.
- What a user can cause ends as one sentence on standard error and an exit code: 2 for settings and usage, 1 for all
  else, 130 for Ctrl-C. A traceback appears only with ``--debug`` or ``STREAMPROC_DEBUG=1``.
- Standard output carries what a script would read, and nothing else.
"""

from __future__ import annotations


def main() -> None:
    """The console entry point."""
    # Typer takes 80 ms to import: what imports only the package does not pay for it.
    from streamproc.cli.root import command  # noqa: PLC0415

    command()(prog_name="streamproc")
