"""``streamproc top`` as it is called: where it asks, what it prints where, how it ends."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from streamproc.cli import top
from streamproc.observe.status import EXAMPLE
from tests.support.asyncs import wait_until
from tests.support.commands import Streamproc, clean_environment, in_this_process
from tests.support.sidecars import answering, write_settings
from tests.support.terminals import Terminal

STATUS = {"/status": (200, EXAMPLE.model_dump_json(by_alias=True).encode())}
OFTEN = ("--interval-s", "0.1")


@pytest.fixture
def streamproc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Streamproc:
    monkeypatch.chdir(tmp_path)

    return in_this_process(capsys, "top", *OFTEN)


def test_one_frame_is_of_two_readings_of_the_sidecar_that_the_settings_name(streamproc: Streamproc) -> None:
    with answering(STATUS) as (port, asked):
        write_settings(port)
        code, out, err = streamproc("--once")
    assert (code, err) == (0, "")
    assert [request for request, _ in asked] == ["GET /status"] * 2
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == f"sentiment ready up 61.5 s generation 2 backend 2024-05 http://127.0.0.1:{port}"
    assert "text running closed 0 0 130 50 ms - - 128" in lines
    assert "text: given up: 1 invalid" in lines
    assert "0 4711 busy 64 of text 8.3 ms 66 212 MiB 0" in lines
    assert "\x1b" not in out


def test_json_is_a_line_with_each_replica_and_the_totals(streamproc: Streamproc) -> None:
    with answering(STATUS) as (port, _), answering(STATUS) as (other, _):
        urls = [f"http://127.0.0.1:{it}" for it in (port, other)]
        code, out, err = streamproc("--once", "--json", "--url", urls[0], "--url", urls[1], "--url", f"{urls[0]}/")
    assert (code, err, out.count("\n")) == (0, "", 1)
    told = json.loads(out)
    assert [it["url"] for it in told["replicas"]] == urls, "each once"
    assert told["results_per_s"] == 0.0
    assert told["tasks"]["text"]["lag_records"] == 260
    assert told["replicas"][1]["tasks"]["text"]["lag_records"] == 130
    assert told["replicas"][1]["workers"][0]["pid"] == 4711


def test_a_replica_that_is_not_there_is_told_beside_one_that_is(streamproc: Streamproc) -> None:
    with answering({}) as (gone, _):
        pass
    with answering(STATUS) as (port, _):
        code, out, _ = streamproc("--once", "--url", f"http://127.0.0.1:{port}", "--url", f"http://127.0.0.1:{gone}")
    assert code == 0
    assert re.search(rf"2: lost for \d+ ms: no sidecar answers at http://127.0.0.1:{gone} \(Connection refused\)", out)
    assert "text" in out


def test_nobody_there_is_one_sentence(streamproc: Streamproc) -> None:
    with answering({}) as (port, _):
        pass
    write_settings(port)
    code, out, err = streamproc()
    assert (code, out) == (1, "")
    assert err == (
        f"no sidecar answers at http://127.0.0.1:{port} (Connection refused); is the processor running there? "
        "--url names another\n"
    )


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"tasks": {}}'])
def test_what_is_no_sidecar_is_told(streamproc: Streamproc, body: bytes) -> None:
    with answering({"/status": (200, body)}) as (port, _):
        code, out, err = streamproc("--url", f"http://127.0.0.1:{port}")
    assert (code, out) == (1, "")
    assert "no sidecar of streamproc" in err or "is it streamproc, and of this version?" in err
    assert err.count("\n") == 1


def test_the_token_of_the_settings_goes_to_their_sidecar_and_to_no_other(
    streamproc: Streamproc, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("open sesame\n")
    with answering(STATUS, token="open sesame") as (port, _):  # noqa: S106 - of a test
        write_settings(port, token="open sesame")  # noqa: S106 - as above
        url = f"http://127.0.0.1:{port}"
        assert streamproc("--once")[0] == 0
        code, _, err = streamproc("--once", "--url", url)
        assert (code, err) == (1, f"{url}/status answers 401: send the token\n")
        assert streamproc("--once", "--url", url, "--token-file", "token")[0] == 0
    code, _, err = streamproc("--url", url, "--token-file", "nowhere")
    assert code == 2
    assert err.startswith("--token-file nowhere cannot be read")


def test_a_token_that_cannot_be_read_here_keeps_nobody_from_looking(streamproc: Streamproc, tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    with answering(STATUS) as (port, _):
        write_settings(port, token_file="token")  # noqa: S106 - the name of a file
        assert streamproc("--once")[0] == 0


def test_a_replica_that_takes_connections_and_says_nothing_holds_up_no_other(
    streamproc: Streamproc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top, "_TIMEOUT_S", 0.2)
    with answering(STATUS) as (port, _), socket.create_server(("127.0.0.1", 0)) as silent:
        other = silent.getsockname()[1]
        code, out, err = streamproc("--once", "--url", f"http://127.0.0.1:{other}", "--url", f"http://127.0.0.1:{port}")
        assert (code, err) == (0, "")
        assert "1: lost for " in out
        assert "0 4711 busy 64 of text" in " ".join(out.replace("2.0", "0").split())
        code, out, err = streamproc("--url", f"http://127.0.0.1:{other}")
    assert (code, out) == (1, "")
    assert err.startswith(
        f"no sidecar answers at http://127.0.0.1:{other} (timed out); is the processor running there?"
    )


def test_in_a_pipe_frames_follow_each_other_until_it_is_told_to_end(tmp_path: Path) -> None:
    with answering(STATUS) as (port, asked):
        process = subprocess.Popen(
            [sys.executable, "-m", "streamproc", "top", *OFTEN, "--json", "--url", f"http://127.0.0.1:{port}"],
            cwd=tmp_path,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_until(lambda: len(asked) >= 4, "it asks again and again")
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")
    assert len(out.splitlines()) >= 2
    assert all(json.loads(line)["replicas"][0]["answers"] for line in out.splitlines())


@pytest.mark.parametrize(("keys", "code"), [("q", 0), ("\x03", 130)])
def test_on_a_terminal_q_and_ctrl_c_end_it_and_the_terminal_is_as_before(tmp_path: Path, keys: str, code: int) -> None:
    with (
        answering(STATUS) as (port, _),
        Terminal("top", *OFTEN, "--url", f"http://127.0.0.1:{port}", cwd=tmp_path) as it,
    ):
        it.until("q ends")
        assert it.modes_now() != it.modes
        it.press("x")
        it.until("q ends")
        it.press(keys)
        assert it.ends() == code
        assert it.modes_now() == it.modes
        before, _, screen = it.seen.partition("\x1b[?1049h")
        assert before == ""
        assert screen.count("\x1b[?1049l") == 1
        assert screen.rindex("\x1b[?25h") > screen.index("\x1b[?25l"), "the cursor is back"
        assert "Traceback" not in it.seen


def test_on_a_terminal_a_processor_that_goes_away_is_shown_until_it_is_back(tmp_path: Path) -> None:
    with contextlib.ExitStack() as serving:
        port, _ = serving.enter_context(answering(STATUS))
        with Terminal("top", *OFTEN, "--url", f"http://127.0.0.1:{port}", cwd=tmp_path) as it:
            it.until("64 of text")
            serving.close()
            it.until("(Connection refused)")
            with answering(STATUS, port=port):
                it.until("64 of text")
                it.resize(8, 80)
                it.until("more lines in a higher window")
                it.press("q")
                assert it.ends() == 0
    assert "Traceback" not in it.seen
