"""The table of privileges and the page about security are the same thing, and the table can be read."""

from __future__ import annotations

from pathlib import Path

from streamproc.broker.privileges import BEGIN, END, NEEDS, render_markdown
from streamproc.cli.root import COMMANDS

PAGE = Path(__file__).parents[2] / "docs" / "security.md"


def test_the_page_has_the_table_as_it_is_in_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) : text.index(END) + len(END)]
    assert shown == render_markdown(), "put in the output of: python -m streamproc.broker.privileges"


def test_every_command_has_its_privileges_or_is_said_to_need_none() -> None:
    without = "`check`, `estimate`, `simulate`, `asyncapi` and `config` ask Kafka for nothing; `demo` brings a broker"
    text = PAGE.read_text(encoding="utf-8")
    assert without in text
    listed = {command.split()[0].rstrip(",") for command in NEEDS}
    none = {"check", "estimate", "simulate", "asyncapi", "config", "demo", "broker", "reload", "circuit", "top"}
    assert listed | none == set(COMMANDS)
    assert not listed & none


def test_no_command_needs_what_another_of_its_privileges_includes() -> None:
    includes = {"Describe": {"Read", "Write", "Alter", "Delete"}, "DescribeConfigs": {"AlterConfigs"}}
    for command, needs in NEEDS.items():
        for need in needs:
            there = {
                it.operation for it in needs if (it.resource, it.of) == (need.resource, need.of) and it is not need
            }
            assert not includes.get(need.operation, set()) & there, f"{command}: {need}"
