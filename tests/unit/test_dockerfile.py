"""The Dockerfile, read line by line: what a reviewer would look for first."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    split = [line.split(None, 1) for line in lines if line.strip() and not line.startswith("#")]
    return [(word.upper(), rest) for word, rest in split]


def all_of(instructions: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for it, rest in instructions if it == word]


def runtime(instructions: list[tuple[str, str]]) -> list[tuple[str, str]]:
    last = max(index for index, (word, _) in enumerate(instructions) if word == "FROM")
    return instructions[last:]


def test_it_has_two_stages_on_a_base_that_can_be_another_one(instructions: list[tuple[str, str]]) -> None:
    assert all_of(instructions, "FROM") == ["${BASE_IMAGE} AS build", "${BASE_IMAGE} AS runtime"]
    assert instructions[0][0] == "ARG"
    name, _, default = instructions[0][1].partition("=")
    assert name == "BASE_IMAGE"
    assert re.fullmatch(r"python:3\.1[1-3]-slim[a-z-]*", default), "a slim Python of a version that pyproject allows"


def test_it_is_run_by_a_user_who_is_not_root(instructions: list[tuple[str, str]]) -> None:
    (user,) = all_of(runtime(instructions), "USER")
    # By number, so that an orchestrator can check it without reading the image's passwd.
    uid, _, gid = user.partition(":")
    assert int(uid) > 0
    assert int(gid) > 0


def test_it_installs_the_wheel_by_the_constraints_with_the_extras_asked_for(
    instructions: list[tuple[str, str]],
) -> None:
    (command,) = [command for command in all_of(instructions, "RUN") if "pip install" in command]
    assert "pip wheel" in command
    assert "--constraint constraints.txt" in command
    assert "${EXTRAS:+[$EXTRAS]}" in command
    assert "EXTRAS=demo" in all_of(instructions, "ARG")


def test_the_runtime_stage_has_a_health_check_and_builds_nothing(instructions: list[tuple[str, str]]) -> None:
    stage = runtime(instructions)
    (check,) = all_of(stage, "HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    compile(command[-1], "HEALTHCHECK", "exec")
    assert "/livez" in command[-1]
    assert not any("pip" in command for command in all_of(stage, "RUN"))
    assert all_of(stage, "ENTRYPOINT") == ['["streamproc"]']


def test_what_it_copies_from_the_context_is_let_through_by_dockerignore(instructions: list[tuple[str, str]]) -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignore
    let_through = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = [rest for rest in all_of(instructions, "COPY") if not rest.startswith("--from")]
    sources = {source.removeprefix("./") for rest in copied for source in rest.split()[:-1]}
    assert sources == let_through
