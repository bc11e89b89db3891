"""Virtual environments of the peers' own, under build/peers: made from pinned requirements, kept between runs.

An environment is whole once the note of its requirements is written, last of all; where they have changed since, it is
made anew.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "peers"
ENVIRONMENTS = HERE.parent / "build" / "peers"
NOTE = "requirements.txt"
LIMIT_S = 900


class EnvironmentFailedError(Exception):
    """A peer's environment could not be made; one sentence."""


def environment(peer: str) -> Path:
    """The Python of this peer's environment, made if need be.

    Raises:
        EnvironmentFailedError: pip could not install its requirements.
    """
    requirements, place = REQUIREMENTS / f"{peer}.txt", ENVIRONMENTS / peer
    wanted, note, python = requirements.read_text(encoding="utf-8"), place / NOTE, place / "bin" / "python"
    if note.exists() and note.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(place, ignore_errors=True)
    steps = [
        [sys.executable, "-m", "venv", str(place)],
        [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False, timeout=LIMIT_S)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise EnvironmentFailedError(f"its environment could not be made: {' '.join(last)}")
    note.write_text(wanted, encoding="utf-8")
    return python


def version(peer: str, package: str) -> str:
    """The pinned version of a package in a peer's requirements."""
    for line in (REQUIREMENTS / f"{peer}.txt").read_text(encoding="utf-8").splitlines():
        name, _, pinned = line.partition("==")
        if name.lower() == package:
            return pinned
    raise KeyError(f"{peer}.txt does not pin {package}")
