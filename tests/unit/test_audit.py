"""The audit of dependencies: what was not looked up is never said to be clean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from deploy.audit.audit import CLEAN, NOT_AUDITED, VULNERABLE, audit

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1)"}
SOUND = {"name": "a", "version": "1", "vulns": []}
ILL = {
    "name": "b",
    "version": "2",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}, {"id": "X", "fix_versions": []}],
}


def asked(**answers: list[dict[str, Any]] | None) -> tuple[int, str]:
    said: list[str] = []

    def ask(service: str) -> dict[str, Any] | None:
        found = answers[service]
        return None if found is None else {"dependencies": found, "fixes": []}

    return audit(ask, said.append), "\n".join(said)


def test_packages_that_were_all_looked_up_and_have_none_are_clean() -> None:
    assert asked(pypi=[SOUND]) == (CLEAN, "1 packages looked up, 0 known vulnerabilities")


def test_a_vulnerability_is_named_with_what_mends_it_and_fails() -> None:
    code, said = asked(pypi=[SOUND, ILL, SKIPPED])
    assert code == VULNERABLE
    assert said.splitlines() == [
        "b 2: PYSEC-1, mended in 3",
        "b 2: X, mended in no version yet",
        "2 packages looked up, 2 known vulnerabilities; NOT AUDITED: c",
    ]


@pytest.mark.parametrize("first", [None, [SKIPPED, SKIPPED], []])
def test_where_the_first_database_knows_nothing_the_second_is_asked(first: list[dict[str, Any]] | None) -> None:
    assert asked(pypi=first, osv=[SOUND])[0] == CLEAN
    assert asked(pypi=first, osv=[ILL])[0] == VULNERABLE


@pytest.mark.parametrize("second", [None, [SKIPPED]])
def test_where_none_can_be_reached_it_says_so_and_is_not_clean(second: list[dict[str, Any]] | None) -> None:
    code, said = asked(pypi=[SKIPPED], osv=second)
    assert code == NOT_AUDITED
    assert said.startswith("NOT AUDITED: no database of vulnerabilities can be reached from here")


def test_what_was_left_out_is_named_and_not_clean() -> None:
    code, said = asked(pypi=[SOUND, SKIPPED])
    assert code == NOT_AUDITED
    assert "NOT AUDITED: c" in said


def test_ci_runs_it_and_lets_nothing_pass_but_what_could_not_be_asked() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (line,) = re.findall(r"^.*deploy/audit/audit\.py.*$", script, re.MULTILINE)
    assert line.endswith(f"|| [ $? -eq {NOT_AUDITED} ]")
