#!/usr/bin/env python3
"""Known vulnerabilities of the pinned dependencies (constraints.txt), by pip-audit.

    python deploy/audit/audit.py

pip-audit asks a database, the package index's own or OSV's, in a network that this machine may not have. Left to itself
it calls what it could not look up "no known vulnerabilities". So the exit code here is 0 only where every package was
looked up and none has any, 1 where one has, and 3 where packages could not be looked up, which is said.

pip-audit has a virtual environment of its own, ``build/audit``, which is made from requirements.txt.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "build" / "audit"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
PINNED = ROOT / "constraints.txt"
SERVICES = ("pypi", "osv")
"""The databases, in the order in which they are tried."""
CLEAN, VULNERABLE, NOT_AUDITED = 0, 1, 3
LONGEST_S = 300.0

Ask = Callable[[str], dict[str, Any] | None]
"""From the name of a database to pip-audit's report; None where it could not be asked."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What a report comes to: packages looked up, those that were not, and a line for each vulnerability."""

    audited: tuple[str, ...]
    skipped: tuple[str, ...]
    found: tuple[str, ...]


def read(report: dict[str, Any]) -> Audit:
    """From pip-audit's JSON."""
    audited, skipped, found = [], [], []
    for it in report["dependencies"]:
        if "skip_reason" in it:
            skipped.append(it["name"])
            continue
        audited.append(it["name"])
        for vulnerability in it["vulns"]:
            mended = ", ".join(vulnerability["fix_versions"]) or "no version yet"
            found.append(f"{it['name']} {it['version']}: {vulnerability['id']}, mended in {mended}")
    return Audit(tuple(audited), tuple(skipped), tuple(found))


def audit(ask: Ask, say: Callable[[str], None]) -> int:
    """Ask the databases until one answers for a package; the exit code."""
    best = Audit((), (), ())
    for service in SERVICES:
        report = ask(service)
        if report is not None and len((it := read(report)).audited) > len(best.audited):
            best = it
        if best.audited:
            break
    for line in best.found:
        say(line)
    if not best.audited:
        say(
            "NOT AUDITED: no database of vulnerabilities can be reached from here; nothing is known of any dependency. "
            "Run `make audit` where there is a network."
        )
        return NOT_AUDITED
    said = f"{len(best.audited)} packages looked up, {len(best.found)} known vulnerabilities"
    if best.skipped:
        said += f"; NOT AUDITED: {', '.join(best.skipped)}"
    say(said)
    if best.found:
        return VULNERABLE
    return NOT_AUDITED if best.skipped else CLEAN


def ask_pip_audit(service: str) -> dict[str, Any] | None:
    """Run pip-audit over the pinned versions."""
    flags = ("--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "10")
    command = [str(ENVIRONMENT / "bin" / "pip-audit"), "-s", service, "-r", str(PINNED), *flags]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST_S)
        report: dict[str, Any] = json.loads(asked.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        return None
    return report


def _installed() -> bool:
    """Whether pip-audit is in its environment, which is made where it is not."""
    if (ENVIRONMENT / "bin" / "pip-audit").exists():
        return True
    steps = (
        [sys.executable, "-m", "venv", str(ENVIRONMENT)],
        [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)],
    )
    return all(subprocess.run(step, check=False).returncode == 0 for step in steps)


def main() -> int:
    """The command."""
    if not _installed():
        print("NOT AUDITED: pip-audit cannot be installed from here")
        return NOT_AUDITED
    return audit(ask_pip_audit, print)


if __name__ == "__main__":
    sys.exit(main())
