"""``streamproc reload``: what it asks the sidecar for, and what it says of the answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streamproc.observe.status import EXAMPLE
from tests.support.commands import in_this_process
from tests.support.sidecars import answering, write_settings

assert EXAMPLE.last_reload is not None
DONE = EXAMPLE.last_reload.model_dump_json().encode()


def reload(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and error."""
    return in_this_process(capsys, "reload")(*arguments)


def test_the_new_version_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with answering({"/reload": (200, DONE)}) as (port, asked):
        write_settings(port)
        assert reload(capsys) == (0, "", "reloaded in 3.2 s: backend version 2024-05, generation 2\n")
        assert asked == [("POST /reload", "application/json")]
        code, out, _ = reload(capsys, "--json", "--url", f"http://127.0.0.1:{port}")
        assert (code, json.loads(out)) == (0, json.loads(DONE))


def test_a_refusal_is_told_with_its_reason_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    answers = {"/reload": (422, b'{"detail": "its worker 0 did not become ready: no module torhc"}')}
    with answering(answers) as (port, _):
        told = reload(capsys, "--url", f"http://127.0.0.1:{port}")
    reason = "its worker 0 did not become ready: no module torhc"
    assert told == (1, "", f"refused, and the version before goes on: {reason}\n")


def test_a_reload_under_way_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with answering({"/reload": (409, b'{"detail": "another reload is under way"}')}) as (port, _):
        url = f"http://127.0.0.1:{port}"
        told = reload(capsys, "--url", url)
    assert told == (1, "", f"{url}/reload answers 409: another reload is under way\n")


def test_settings_that_are_broken_are_told_before_anybody_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("streamproc.yaml").write_text("name: app\nbackend: {path: 3\n")
    code, out, err = reload(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("streamproc.yaml:")
