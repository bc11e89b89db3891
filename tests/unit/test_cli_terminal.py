"""What a person sees: tables that fit, colours only where they are wanted, a word when Kafka keeps one waiting."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from streamproc.broker.topics import Change, Plan
from streamproc.cli import config, kafka_options, lag, terminal, topics
from streamproc.settings import KafkaSettings
from tests.conftest import Run
from tests.support.terminals import Terminal

SETTINGS = """\
name: app
backend: {path: "inference:Backend"}
tasks: {text: {input: {topics: [in]}}}
"""

Narrow = Callable[[int], None]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Narrow:
    def narrow(columns: int) -> None:
        monkeypatch.setattr(terminal.stdout, "width", columns)

    return narrow


def on_a_terminal(*arguments: str, cwd: Path, **environ: str) -> str:
    """What a command prints on a terminal of 80 columns."""
    with Terminal(*arguments, cwd=cwd, environ=environ) as it:
        it.ends()
        return it.seen


@pytest.mark.parametrize("command", [["--help"], ["check"], ["lag", "--nope"], ["topics", "plan", "--dir", "none"]])
def test_no_color_is_plain(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "streamproc.yaml").write_text(SETTINGS)
    assert re.search(r"\x1b\[[\d;]*m", on_a_terminal(*command, cwd=tmp_path))
    assert not re.search(r"\x1b\[[\d;]*m", on_a_terminal(*command, cwd=tmp_path, NO_COLOR="1"))


def test_who_waits_for_kafka_is_told(tmp_path: Path) -> None:
    seen = on_a_terminal("consume", "any", "-b", "127.0.0.1:1", cwd=tmp_path, STREAMPROC_KAFKA__CONNECT_TIMEOUT_S="1.6")
    told = seen.split("\r\n")
    assert told[0] == "waiting for Kafka at 127.0.0.1:1 …"
    assert "no Kafka broker answers at 127.0.0.1:1" in told[1]


def test_who_does_not_wait_long_is_told_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(terminal, "stderr", Console(file=written, force_terminal=True))
    monkeypatch.setattr(kafka_options, "stderr", terminal.stderr)
    monkeypatch.setattr(kafka_options, "WAITING_AFTER_S", 0.0)

    async def main(rounds: int) -> None:
        with kafka_options.waiting_for(KafkaSettings()):
            for _ in range(rounds):
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    run(main(0))
    assert written.getvalue() == ""
    run(main(3))
    assert "waiting for Kafka at localhost:9092" in written.getvalue()


def test_a_table_in_a_pipe_has_no_trailing_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(("name", "note"), [("a", "x"), ("b" * 30, "")])
    assert capsys.readouterr().out == f"name{' ' * 28}note\na{' ' * 31}x\n{'b' * 30}\n"


def test_lag_is_legible_at_60_columns(narrow: Narrow, capsys: pytest.CaptureFixture[str]) -> None:
    narrow(60)
    lag._print([lag.PartitionLag("digits", "digits-by-hand", 11, 1_234_567, 2_345_678, 1_111_111, 86_400.0)])
    out = capsys.readouterr().out
    for whole in ("digits", "digits-by-hand", "11", "1,111,111", "86,400.0", "lag (records)"):
        assert whole in out
    assert "committed" not in out
    assert all(len(line) <= 60 for line in out.splitlines())
    narrow(120)
    lag._print([lag.PartitionLag("digits", "digits-by-hand", 11, 1_234_567, 2_345_678, 1_111_111, 86_400.0)])
    assert "2,345,678" in capsys.readouterr().out


def test_a_plan_is_legible_at_60_columns(narrow: Narrow, capsys: pytest.CaptureFixture[str]) -> None:
    narrow(60)
    change = Change("configure", "handwritten-digits.dead", "max.message.bytes", "1048588", "1114124", note="a note")
    topics._show(Plan((change, Change("delete", "x", destructive=True))))
    out = capsys.readouterr().out
    for whole in ("handwritten-digits.dead", "configure", "max.message.bytes", "1048588", "1114124", "(destructive)"):
        assert whole in out
    assert "note" not in out
    assert all(len(line) <= 60 for line in out.splitlines())


def test_settings_are_legible_at_60_columns() -> None:
    def place_of(_: object) -> str:
        return "environment variable STREAMPROC_KAFKA__CLIENT_ID"

    assert list(config._yaml({"kafka": {"client_id": "me"}}, place_of, 60)) == [
        "kafka:",
        "  # environment variable STREAMPROC_KAFKA__CLIENT_ID",
        '  client_id: "me"',
    ]
    assert list(config._yaml({"name": "a"}, lambda _: "default", 60)) == ['name: "a" # default']
