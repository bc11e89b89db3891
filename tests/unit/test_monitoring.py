"""Alert rules and dashboard: every expression parses, and asks for metrics and labels that there are.

Three checks hold the rules. Those here parse each expression and compare its names with the metric table, everywhere.
``promtool check`` and ``promtool test rules`` (when each alert fires, and when it does not) run where promtool is: on
the path, or in ``build/bin``, where ``deploy/prometheus/promtool.sh`` puts it; CI calls that. Where it cannot be had
they are skipped and say so, and what the file of tests has to hold is checked here all the same.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from streamproc.observe.metric_table import (
    CLOSE_RULES,
    PRODUCER_OUTPUTS,
    RESTART_CAUSES,
    STEPS,
    TABLE,
    WORKER_STATES,
    MetricSpec,
)
from streamproc.records import Cause
from tests.unit.test_documents import slug

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
ALERT_TESTS = ROOT / "deploy" / "prometheus" / "alerts.test.yml"
CONFIG = ROOT / "deploy" / "prometheus" / "prometheus.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "streamproc.json"
GRAFANA = ROOT / "deploy" / "grafana" / "provisioning"
RUNBOOK = ROOT / "docs" / "deployment.md"

TARGET_LABELS = {"job", "instance", "namespace", "pod"}
"""Prometheus' own, of the scraped target."""
OF_THE_PROCESS = {"process_resident_memory_bytes"}
VALUES: dict[str, set[str]] = {
    "rule": set(CLOSE_RULES),
    "output": set(PRODUCER_OUTPUTS),
    "step": set(STEPS),
    "state": set(WORKER_STATES),
    "outcome": {"ok", "failed"},
    "direction": {"decode", "encode"},
    "cause": {*RESTART_CAUSES, *map(str, Cause)},
}


def series() -> dict[str, tuple[MetricSpec | None, set[str]]]:
    """Every series that Prometheus gets from a processor, with its labels."""
    found: dict[str, tuple[MetricSpec | None, set[str]]] = {name: (None, set()) for name in OF_THE_PROCESS}
    for spec in TABLE:
        labels = set(spec.labels)
        if spec.kind == "histogram":
            found[f"{spec.name}_bucket"] = (spec, {*labels, "le"})
            found[f"{spec.name}_sum"] = found[f"{spec.name}_count"] = (spec, labels)
        else:
            found[spec.name] = (spec, labels)
    return found


SERIES = series()


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def panels() -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return shown


def queries() -> Iterator[tuple[str, str]]:
    """Every expression with its place, Grafana's interval filled in."""
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel.get("targets", []):
            yield f"{panel['title']} {target['refId']}", target["expr"].replace("$__rate_interval", "1m")


QUERIES = list(queries())


def nodes(expression: str) -> list[Any]:
    found: list[Any] = []

    def visit(node: promql_parser.Expr) -> None:
        found.append(node)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    inside = nodes(expression)
    ranges = [it.vector_selector for it in inside if isinstance(it, promql_parser.MatrixSelector)]
    return [it for it in inside if isinstance(it, promql_parser.VectorSelector)] + ranges


@pytest.mark.parametrize(("place", "expression"), QUERIES, ids=[place for place, _ in QUERIES])
def test_every_expression_asks_for_metrics_and_labels_of_the_table(place: str, expression: str) -> None:
    named: set[str] = set()
    for selector in selectors(expression):
        assert selector.name in SERIES, f"{place}: {selector.name}"
        _, labels = SERIES[selector.name]
        named |= labels
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels | TARGET_LABELS, f"{place}: {selector.name} has no {matcher.name}"
            if "$" not in matcher.value and matcher.name in VALUES:
                assert set(matcher.value.split("|")) <= VALUES[matcher.name], f"{place}: {matcher}"
    for node in nodes(expression):
        modifier = getattr(node, "modifier", None)
        grouped: list[str] = modifier.labels if isinstance(modifier, promql_parser.AggModifier) else []
        if isinstance(modifier, promql_parser.BinModifier) and modifier.matching is not None:
            grouped = modifier.matching.labels
        assert set(grouped) <= named | TARGET_LABELS, f"{place}: groups by {grouped}"


@pytest.mark.parametrize(("place", "expression"), QUERIES, ids=[place for place, _ in QUERIES])
def test_counters_are_asked_for_their_rate_and_gauges_for_their_value(place: str, expression: str) -> None:
    over_time = {
        arg.vector_selector.name: node.func.name
        for node in nodes(expression)
        if isinstance(node, promql_parser.Call)
        for arg in node.args
        if isinstance(arg, promql_parser.MatrixSelector)
    }
    for selector in selectors(expression):
        spec, _ = SERIES[str(selector.name)]
        counts = spec is not None and spec.kind in ("counter", "histogram")
        assert (over_time.get(str(selector.name)) in ("rate", "increase")) == counts, f"{place}: {selector.name}"


# -- alerts


def test_what_was_asked_for_is_told_of() -> None:
    names = {rule["alert"] for rule in alerts()}
    assert {
        *("StreamprocLag", "StreamprocCircuitOpen", "StreamprocWorkerRestarts"),
        *("StreamprocDeadLetters", "StreamprocNoProgress", "StreamprocAbsent"),
    } <= names
    assert len(names) == len(alerts())


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_says_what_is_the_matter_and_what_to_do(rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"Streamproc[A-Z]\w+", rule["alert"])
    assert re.fullmatch(r"\d+[sm]", rule.get("for", "0s"))
    assert rule["labels"]["severity"] in ("warning", "critical")
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "action", "runbook"}
    assert all(len(notes[it]) > 20 for it in ("summary", "description", "action"))
    # What a note names, the alert has.
    kept = {label for node in nodes(rule["expr"]) for label in getattr(getattr(node, "modifier", None), "labels", [])}
    for note in notes.values():
        assert set(re.findall(r"\$labels\.(\w+)", note)) <= kept, note


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_the_runbook_of_every_alert_has_its_section(rule: dict[str, Any]) -> None:
    file, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert ROOT / file == RUNBOOK
    headings = re.findall(r"^#+ (.+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor in map(slug, headings)
    assert anchor == rule["alert"].lower()


def test_the_tests_of_the_rules_let_each_alert_fire_and_not_fire() -> None:
    written = yaml.safe_load(ALERT_TESTS.read_text(encoding="utf-8"))
    assert written["rule_files"] == [ALERTS.name]
    fires: set[str] = set()
    is_silent: set[str] = set()
    for test in written["tests"]:
        for given in test["input_series"]:
            (selector,) = selectors(given["series"])
            assert selector.name in SERIES, f"{test['name']}: {selector.name}"
            labels = {matcher.name for matcher in selector.matchers.matchers}
            _, known = SERIES[selector.name]
            assert known <= labels <= known | TARGET_LABELS, f"{test['name']}: {selector.name}"
        for check in test["promql_expr_test"]:
            (name,) = re.findall(r'ALERTS\{alertname="(\w+)", alertstate="firing"\}', check["expr"])
            (fires if check.get("exp_samples") else is_silent).add(name)
    names = {rule["alert"] for rule in alerts()}
    assert fires == names
    assert is_silent == names


def promtool() -> str:
    found = shutil.which("promtool") or shutil.which("promtool", path=str(ROOT / "build" / "bin"))
    if found is None:
        pytest.skip("promtool is not installed (deploy/prometheus/promtool.sh build/bin gets it from Debian)")
    return found


@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", ALERTS), ("check", "config", CONFIG), ("test", "rules", ALERT_TESTS)],
    ids=lambda it: " ".join(map(str, it[:2])),
)
def test_promtool_accepts_the_rules_and_sees_each_alert_fire_when_it_should(arguments: tuple[str | Path, ...]) -> None:
    asked = subprocess.run([promtool(), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert "SUCCESS" in asked.stdout


# -- dashboard


def test_the_dashboard_shows_what_an_operator_looks_for() -> None:
    asked = [expression for _, expression in QUERIES[len(alerts()) :]]
    shown = {spec.name for it in asked for found in selectors(it) if (spec := SERIES[str(found.name)][0]) is not None}
    assert shown >= {
        *("streamproc_records_in_total", "streamproc_records_out_total", "streamproc_lag_seconds"),
        *("streamproc_batch_fill_ratio", "streamproc_batch_padding_ratio", "streamproc_step_seconds"),
        *("streamproc_workers", "streamproc_worker_restarts_total", "streamproc_circuit_open"),
        *("streamproc_records_dead_total", "streamproc_commits_total", "streamproc_commit_failures_total"),
    }
    assert any("by (task, cause) (rate(streamproc_records_dead_total" in it for it in asked)


def test_the_panels_of_the_dashboard_lie_beside_each_other() -> None:
    assert len({panel["id"] for panel in panels()}) == len(panels())
    places = [(panel["title"], panel["gridPos"]) for panel in panels()]
    for title, at in places:
        assert 0 <= at["x"] < at["x"] + at["w"] <= 24, title
    for (one, a), (other, b) in itertools.combinations(places, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, f"{one} and {other} overlap"


@pytest.mark.parametrize("panel", [it for it in panels() if it["type"] != "row"], ids=lambda it: it["title"])
def test_every_panel_says_what_it_shows_and_in_which_unit(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 20
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    if panel["type"] == "alertlist":
        return
    assert panel["fieldConfig"]["defaults"]["unit"] in {"short", "none", "s", "cps", "bytes", "percentunit"}
    assert panel["targets"]
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "1m")
        top = promql_parser.parse(expression)
        labels = {
            label for node in nodes(expression) for label in getattr(getattr(node, "modifier", None), "labels", [])
        }
        if isinstance(top, promql_parser.VectorSelector):
            labels = SERIES[str(top.name)][1] | TARGET_LABELS
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels, target["legendFormat"]


def test_what_the_dashboard_asks_by_is_there() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    variables = {it["name"]: it for it in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"]))) - {"__rate_interval"}
    assert used == set(variables)
    (source,) = yaml.safe_load((GRAFANA / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert variables["datasource"]["current"]["value"] == source["uid"]
    for name in ("job", "task"):
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variables[name]["definition"])
        assert asked
        (selector,) = selectors(asked[1])
        assert asked[2] in SERIES[str(selector.name)][1] | TARGET_LABELS


def test_the_list_of_alerts_shows_ours() -> None:
    (listed,) = [panel for panel in panels() if panel["type"] == "alertlist"]
    assert all(listed["options"]["alertName"] in rule["alert"] for rule in alerts())
