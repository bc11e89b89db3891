"""Streamproc's command on a terminal of its own, with somebody at the keyboard."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.asyncs import wait_until
from tests.support.commands import clean_environment


class Terminal:
    """A command on a terminal; killed at the end of the ``with`` block if it still runs."""

    def __init__(self, *arguments: str, cwd: Path, environ: Mapping[str, str] | None = None) -> None:
        """It has 24 lines of 80 columns at first."""
        self._arguments = arguments
        self._cwd = cwd
        clean = {name: value for name, value in clean_environment().items() if name not in ("NO_COLOR", "COLUMNS")}
        self._environ = {**clean, "TERM": "xterm-256color", **(environ or {})}
        self.seen = ""

    def __enter__(self) -> Self:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        self.modes = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            # In a session with this terminal, whose Ctrl-C is a signal then.
            ["setsid", "--ctty", sys.executable, "-m", "streamproc", *self._arguments],
            cwd=self._cwd,
            env=self._environ,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        self._theirs = theirs
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._theirs)
        os.close(self._ours)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._ours, keys.encode())

    def resize(self, lines: int, columns: int) -> None:
        """Make the window larger or smaller."""
        termios.tcsetwinsize(self._ours, (lines, columns))

    def until(self, text: str) -> None:
        """Wait until the command has printed this since the last such wait."""
        before = len(self.seen)
        wait_until(lambda: text in self._read()[before:], f"it prints {text!r}")

    def ends(self) -> int:
        """Wait for its end; its exit code."""
        wait_until(lambda: (self._read(), self.process.poll())[1] is not None, "it ends")
        self._read()
        return self.process.wait()

    def modes_now(self) -> list[object]:
        """How the terminal is set."""
        return list(termios.tcgetattr(self._theirs))

    def _read(self) -> str:
        while select.select([self._ours], [], [], 0)[0]:
            self.seen += os.read(self._ours, 65_536).decode(errors="replace")
        return self.seen
