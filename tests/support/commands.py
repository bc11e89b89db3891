"""Streamproc's command in a clean environment: as a subprocess without anybody's settings, or in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from streamproc.cli import root

Streamproc = Callable[..., tuple[int, str, str]]
"""Called with arguments, answers the exit code, and what went to stdout and to stderr."""

ROOT = Path(__file__).resolve().parents[2]


def clean_environment() -> dict[str, str]:
    """The environment without what would be taken for settings, and this checkout on the path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMPROC_", "INFERENCE_"))}
    return {**clean, "PYTHONPATH": str(ROOT)}


def run_command(folder: Path, *arguments: str, code: int, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder; it has to end with this exit code, and to say no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "streamproc", *arguments],
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def in_this_process(capsys: pytest.CaptureFixture[str], *first: str) -> Streamproc:
    """The command within the test's own process, where the world may be another one by monkeypatch.

    ``first`` comes before the arguments of each call.
    """

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            root.command()(args=[*first, *arguments], prog_name="streamproc")
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    return run
