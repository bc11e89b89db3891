"""What the documents say of the code is what the code says."""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import typer
import yaml

from streamproc.cli import demo
from streamproc.cli.root import COMMANDS, command
from streamproc.demo.report import Tally
from streamproc.observe.http import create_app
from streamproc.observe.metrics import Metrics
from streamproc.settings import HttpSettings, Settings
from tests.support.settings_table import BEGIN, END, README, table
from tests.unit.test_demo_report import batch, result

ROOT = Path(__file__).parents[2]
EXAMPLE_READMES = sorted((ROOT / "examples").glob("*/README.md"))
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), *EXAMPLE_READMES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
GIVES = "# → "


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def blocks(document: Path, language: str) -> Iterator[tuple[int, str]]:
    """The code of a language, each with the line that it begins in."""
    text = document.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found[1] == language:
            yield text.count("\n", 0, found.start(2)) + 1, found[2]


# -- Python


# What testing.md shows are files, which tests/acceptance/test_testing_project.py writes and runs.
PYTHON = [
    (document, line, code)
    for document in DOCUMENTS[1:]
    if document.name != "testing.md"
    for line, code in blocks(document, "python")
]


@pytest.mark.parametrize(
    ("document", "line", "code"), PYTHON, ids=[f"{name_of(document)}:{line}" for document, line, _ in PYTHON]
)
def test_the_python_of_a_document_runs_and_gives_what_it_says(
    document: Path, line: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    shown = "\n" * (line - 1) + code  # so that an error names the document's own line
    lines = shown.split("\n")
    names: dict[str, Any] = {"__name__": "document"}
    checked = 0
    for statement in ast.parse(shown).body:
        following = lines[statement.end_lineno or 0]
        if isinstance(statement, ast.Expr) and following.startswith(GIVES):
            given = eval(compile(ast.Expression(statement.value), str(document), "eval"), names)  # noqa: S307 - ours
            said = eval(following.removeprefix(GIVES), names)  # noqa: S307 - as above
            assert given == said, f"{name_of(document)}:{statement.lineno} gives {given!r}"
            checked += 1
        else:
            exec(compile(ast.Module([statement], []), str(document), "exec"), names)  # noqa: S102 - as above
    assert checked == code.count(GIVES) > 0, "each block shows what it gives, after the line that gives it"


def test_the_first_backend_of_the_readme_is_the_example() -> None:
    example = ROOT / "examples" / "first_backend"
    ((_, code),) = blocks(README, "python")
    assert code == (example / "inference.py").read_text(encoding="utf-8")
    (_, settings), *_ = blocks(README, "yaml")
    assert settings == (example / "streamproc.yaml").read_text(encoding="utf-8")
    ((_, records),) = blocks(README, "")
    assert records == (example / "texts.jsonl").read_text(encoding="utf-8")


def test_the_first_backend_is_run_by_the_readmes_commands_which_are_those_of_the_example() -> None:
    """Those of the example are run in tests/acceptance/test_examples.py."""
    both = []
    for document in (README, ROOT / "examples" / "first_backend" / "README.md"):
        found = re.search(
            r"^ {4}streamproc broker.*\n(?: {4}.+\n)+", document.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert found
        commands = [shlex.split(line, comments=True) for line in found[0].splitlines()]
        both.append([command for command in commands if command[0] == "streamproc"])
    assert both[0] == both[1]


# -- settings


def test_the_settings_table_is_the_models() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == table(), "run: python -m tests.support.settings_table"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_the_settings_that_a_document_shows_are_valid(document: Path) -> None:
    for line, text in blocks(document, "yaml"):
        shown = yaml.safe_load(text)
        if set(shown) <= set(Settings.model_fields):
            rest = {"name": "shown", "backend": {"path": "a:B"}, "tasks": {"text": {"input": {"topics": ["text"]}}}}
            Settings.model_validate(rest | shown)
        elif "services" in shown:
            compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
            assert set(shown["services"]) <= set(compose["services"]), f"{name_of(document)}:{line}"
        else:
            assert "topic" in shown, f"{name_of(document)}:{line}: what is this?"


# -- commands


def commands_of(document: Path) -> list[list[str]]:
    """Every command of ours that a document shows, in a block of its own or within the text."""
    text = FENCE.sub("", document.read_text(encoding="utf-8")).replace("\\|", "|")
    shown = [line.strip() for line in re.findall(r"^ {4}(.+)$", text, re.MULTILINE)]
    shown += [" ".join(it.split()) for it in re.findall(r"`([^`]+)`", text)]
    found = []
    for line in shown:
        for part in line.split(" | "):
            # Behind variables and other programs that start it; what follows a colon is a place in the text.
            begun = re.search(r"^(?:[A-Z_]+=\S+ |docker compose exec \w+ |\.venv/bin/)*(streamproc(?: .*)?)$", part)
            if begun and ":" not in begun[1].split("#")[0]:
                found.append(shlex.split(begun[1], comments=True))
    return found


@pytest.mark.parametrize("document", [it for it in DOCUMENTS if it.stem != "design"], ids=name_of)
def test_the_commands_that_a_document_shows_exist_with_their_options(document: Path) -> None:
    group = command()
    for words in commands_of(document):
        rest = [word for word in words[1:] if word not in ("--debug", "…")]
        if not rest:
            continue
        assert rest[0] in COMMANDS, f"{name_of(document)}: {shlex.join(words)}"
        _, found, rest = group.resolve_command(typer.Context(group), rest)
        if hasattr(found, "commands"):
            name, *rest = rest or [""]
            assert name in ("", *found.commands), f"{name_of(document)}: {shlex.join(words)}"
            found = found.commands.get(name, found)
        options = {option for parameter in found.params for option in (*parameter.opts, "--help")}
        for word in rest:
            if re.match(r"--?[a-z]", word):
                assert word in options, f"{name_of(document)}: {shlex.join(words)}"


def test_the_demo_prints_what_the_readme_shows_but_for_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally()
    tally.add_result(result(0), 2_000)
    tally.add_metrics(batch(1, transform_inputs=0.1))
    tally.batches[0]["execution_times"]["transform_inputs"] = 0.1
    demo._show(tally.figures({0: 1}, workers=1))
    demo._Lines(0).advance(0, None)

    def without_numbers(text: str) -> list[str]:
        return [re.sub(r"[\d,.]*\d%?", "N", " ".join(line.split())) for line in text.splitlines() if line.strip()]

    text = README.read_text(encoding="utf-8")
    shown = re.search(r"^ {4}streamproc demo\n(?:(?: {4}.*)?\n)*?(?=^\S)", text, re.MULTILINE)
    assert shown
    assert without_numbers(capsys.readouterr().out) == without_numbers(shown[0])


# -- places


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_what_a_document_links_to_is_there(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), f"{name_of(document)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name_of(document)} links to {target}"


def test_the_endpoints_that_documents_and_examples_name_exist() -> None:
    app = create_app(Mock(), Metrics(), HttpSettings(), inputs=dict, reload=Mock())
    paths = {*app.openapi()["paths"], "/tasks/{task}/predict"}
    named = {
        path
        for file in [*DOCUMENTS, *(ROOT / "examples").glob("*/*.yaml"), ROOT / "docker-compose.yml"]
        for path in re.findall(r"(?:localhost|127\.0\.0\.1):8080(/[\w/]+)", file.read_text(encoding="utf-8"))
    }
    assert {"/status", "/readyz"} <= named
    patterns = [re.compile(re.sub(r"\{\w+\}", r"\\w+", path)) for path in paths]
    assert not [path for path in named if not any(it.fullmatch(path) for it in patterns)]
    table_of_the_readme = set(re.findall(r"^\| `(/[\w/{}]+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert table_of_the_readme == paths
