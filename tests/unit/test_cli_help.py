"""The command line as a whole: help, usage errors, and what becomes of an exception."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from streamproc.cli import root
from streamproc.cli.positions import Where, parse_where
from streamproc.errors import BrokerError, InternalError, SettingsError
from tests.support.commands import Streamproc, in_this_process

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    [],
    *([name] for name in root.COMMANDS),
    ["topics", "plan"],
    ["topics", "apply"],
    ["circuit", "status"],
    ["circuit", "close"],
    ["circuit", "open"],
    ["config", "schema"],
    ["config", "show"],
]


@pytest.fixture
def streamproc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Streamproc:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv(root.DEBUG_VARIABLE, raising=False)
    # --debug sets it for the processes that a command starts; undone with the fixture.
    monkeypatch.setenv(root.DEBUG_VARIABLE, "")

    return in_this_process(capsys)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_an_example_and_explains_every_option(streamproc: Streamproc, command: list[str]) -> None:
    code, out, _ = streamproc(*command, "--help")
    assert code == 0
    assert f"Example: {' '.join(['streamproc', *command])}" in out
    assert "Traceback" not in out
    for line in out.splitlines():
        if line.startswith("│ --"):
            assert line.strip("│ ").count("  ") >= 1, f"an option without a word of help: {line}"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_flags_and_arguments_without_decorations(streamproc: Streamproc, command: list[str]) -> None:
    _, out, _ = streamproc(*command, "--help")
    assert not re.search(r"<\w+|\{[A-Z]", out)


def test_the_usage_names_the_arguments(streamproc: Streamproc) -> None:
    assert "Usage: streamproc consume [OPTIONS] TOPIC\n" in re.sub(" +\n", "\n", streamproc("consume", "--help")[1])
    assert "[OPTIONS] TOPIC [FILE|-]" in streamproc("produce")[2]


def test_help_imports_nothing_that_is_slow() -> None:
    code = (
        "import sys\n"
        "from streamproc.cli import main\n"
        "sys.argv = ['streamproc', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'aiokafka', 'numpy', 'pydantic', 'fastapi', 'yaml', 'uvloop'} & set(sys.modules)))\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_summaries_and_the_modules_are_there_for_every_command() -> None:
    for module, summary in root.COMMANDS.values():
        assert importlib.import_module(module).app is not None
        assert summary.endswith(".")


def test_a_command_that_is_nearly_right_is_told_the_right_one(streamproc: Streamproc) -> None:
    code, _, err = streamproc("comsume")
    assert code == 2
    assert "consume" in err


def test_no_command_shows_the_help_and_is_a_usage_error(streamproc: Streamproc) -> None:
    code, out, _ = streamproc()
    assert code == 2
    assert "Usage: streamproc" in out


def test_an_unknown_option_is_a_usage_error(streamproc: Streamproc) -> None:
    assert streamproc("lag", "--fast")[0] == 2


def test_the_version_is_the_packages(streamproc: Streamproc) -> None:
    code, out, _ = streamproc("--version")
    assert code == 0
    assert out.startswith("streamproc ")


def _raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def load_with_places(*_: object) -> None:
        raise error

    monkeypatch.setattr("streamproc.settings_loading.load_with_places", load_with_places)


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (
            SettingsError("is wrong", setting="name", place="file:1", hint="mend it"),
            2,
            "file:1: name: is wrong; mend it",
        ),
        (BrokerError("Kafka said [no]"), 1, "Kafka said [no]"),
        (KeyError("x"), 1, "unexpected KeyError: 'x'"),
    ],
)
def test_an_error_is_one_sentence_and_an_exit_code(
    streamproc: Streamproc, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, sentence: str
) -> None:
    _raising(monkeypatch, error)
    result, out, err = streamproc("config", "show")
    assert result == code
    assert out == ""
    assert err.startswith(sentence)
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_debug_adds_the_traceback(streamproc: Streamproc, monkeypatch: pytest.MonkeyPatch) -> None:
    _raising(monkeypatch, BrokerError("no"))
    code, _, err = streamproc("--debug", "config", "show")
    assert code == 1
    assert "Traceback" in err
    assert err.endswith("no\n")


def _wrapped_by_an_import() -> ImportError:
    error = ImportError("half imported")
    error.__context__ = KeyboardInterrupt()
    return error


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        InternalError(KeyboardInterrupt(), where="task text"),
        _wrapped_by_an_import(),
        BaseExceptionGroup("several", [KeyboardInterrupt()]),
    ],
    ids=repr,
)
def test_ctrl_c_is_130_and_silent(
    streamproc: Streamproc, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    _raising(monkeypatch, error)
    assert streamproc("config", "show") == (130, "", "")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "streamproc", "config", "schema"],
            stdout=writer,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("text", "begin"),
    [
        ("beginning", Where()),
        ("end", Where(at_end=True)),
        ("42", Where(offset=42)),
        ("-5", Where(offset=-5)),
        ("15m", Where(time_ms=100_000)),
        ("1.5s", Where(time_ms=998_500)),
        ("1970-01-01T00:00:01+00:00", Where(time_ms=1_000)),
        ("1970-01-01T00:00:01Z", Where(time_ms=1_000)),
    ],
)
def test_where_to_begin_is_an_offset_a_time_or_an_age(text: str, begin: Where) -> None:
    assert parse_where(text, 1_000.0, "--from") == begin
