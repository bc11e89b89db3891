"""``streamproc circuit``: where it looks for the sidecar, and what it says when there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamproc.observe.status import CircuitStatus
from tests.support.commands import Streamproc, in_this_process
from tests.support.sidecars import answering, write_settings

CLOSED = CircuitStatus(bad=3, decided=1_200, openings=2).model_dump(mode="json")
OPEN = CircuitStatus(
    state="open", bad=812, decided=1_000, openings=1, closes_in_s=43.2, reason="812 of the last 1,000 records failed"
).model_dump(mode="json")
BY_HAND = {**CLOSED, "state": "open", "reason": "opened by hand"}


@pytest.fixture
def streamproc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Streamproc:
    monkeypatch.chdir(tmp_path)
    # Whatever stands in the way to the world, this machine is asked directly.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    return in_this_process(capsys, "circuit")


def status_of(**circuits: dict[str, Any]) -> tuple[int, bytes]:
    return 200, json.dumps({"tasks": {name: {"circuit": circuit} for name, circuit in circuits.items()}}).encode()


def test_the_status_is_a_row_for_each_task(streamproc: Streamproc) -> None:
    with answering({"/status": status_of(text=OPEN, image=CLOSED, sound=BY_HAND)}) as (port, _):
        write_settings(port)
        code, out, _ = streamproc("status")
        assert code == 0
        assert [" ".join(line.split()) for line in out.splitlines()][1:] == [
            "text open 812 1,000 1 43 812 of the last 1,000 records failed",
            "image closed 3 1,200 2",
            "sound open 3 1,200 2 never opened by hand",
        ]
        assert json.loads(streamproc("status", "text", "--json")[1]) == {"text": OPEN}


def test_a_change_is_posted_as_json_and_its_outcome_told(streamproc: Streamproc) -> None:
    answers = {
        "/status": status_of(text=OPEN),
        "/tasks/text/circuit/close": (200, json.dumps(CLOSED).encode()),
        "/tasks/text/circuit/open": (200, json.dumps(OPEN).encode()),
    }
    with answering(answers) as (port, asked):
        write_settings(port, host="0.0.0.0")  # noqa: S104 - which means this machine too
        assert streamproc("close") == (0, "", "task text: the circuit is closed\n")
        assert asked[-1] == ("POST /tasks/text/circuit/close", "application/json")
        code, out, err = streamproc("open", "text", "--url", f"http://127.0.0.1:{port}/")
        assert (code, out) == (0, "")
        assert err == "task text: the circuit is already open: 812 of the last 1,000 records failed\n"
        assert json.loads(streamproc("close", "text", "--json")[1]) == CLOSED


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["close"], "say which task; the tasks are: text, image\n"),
        (["open", "txet"], "there is no task txet; the tasks are: text, image\n"),
        (["status", "txet"], "there is no task txet; the tasks are: text, image\n"),
    ],
)
def test_a_task_that_is_not_clear_is_a_usage_error(streamproc: Streamproc, arguments: list[str], sentence: str) -> None:
    with answering({"/status": status_of(text=OPEN, image=CLOSED)}) as (port, asked):
        write_settings(port)
        assert streamproc(*arguments) == (2, "", sentence)
        assert [request for request, _ in asked] == ["GET /status"]


def test_a_refusal_is_told_in_the_sidecars_words(streamproc: Streamproc) -> None:
    answers = {"/status": status_of(text=OPEN), "/tasks/text/circuit/close": (409, b'{"detail": "it is stopping"}')}
    with answering(answers) as (port, _):
        code, _, err = streamproc("close", "--url", f"http://127.0.0.1:{port}")
    assert (code, err) == (1, f"http://127.0.0.1:{port}/tasks/text/circuit/close answers 409: it is stopping\n")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"tasks": {}}', b'{"tasks": {"text": {}}}'])
def test_what_is_no_sidecar_is_told(streamproc: Streamproc, body: bytes) -> None:
    with answering({"/status": (200, body)}) as (port, _):
        code, out, err = streamproc("status", "--url", f"http://127.0.0.1:{port}")
    assert (code, out) == (1, "")
    assert "no sidecar of streamproc" in err or "has no circuits" in err
    assert err.count("\n") == 1


def test_nobody_there_is_one_sentence(streamproc: Streamproc) -> None:
    with answering({}) as (port, _):
        pass
    write_settings(port)
    code, out, err = streamproc("close")
    assert (code, out) == (1, "")
    assert err == (
        f"no sidecar answers at http://127.0.0.1:{port} (Connection refused); is the processor running there? "
        "--url names another\n"
    )


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8080", "ftp://here:1", "file:///etc/passwd", "http://", "http://x:y", "http://x:99999", "http://["],
)
def test_a_url_that_is_none_is_a_usage_error(streamproc: Streamproc, url: str) -> None:
    assert streamproc("status", "--url", url) == (2, "", f"--url is {url!r}; write it as http://HOST:PORT\n")


def test_a_port_that_was_left_to_chance_has_to_be_given(streamproc: Streamproc) -> None:
    write_settings(0)
    code, _, err = streamproc("status")
    assert code == 2
    assert "http.port: the sidecar has taken any free port; give --url URL" in err


def test_a_sidecar_that_is_off_is_told(streamproc: Streamproc) -> None:
    write_settings(8080, enabled=False)
    code, _, err = streamproc("status")
    assert code == 2
    assert "http.enabled: the sidecar is off" in err
