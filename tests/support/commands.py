"""Streamproc's command as a subprocess, in an environment without settings of whoever runs the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
