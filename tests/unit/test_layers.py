"""The architecture, held: who may import whom, and a file map that names every module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "streamproc"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

# Which parts of the package each part may import, beside itself.
BASE = {"errors", "records", "py.typed"}
MAY_IMPORT = {
    "errors": set[str](),
    "records": set[str](),
    "yaml_lines": {"errors"},
    "certificates": {"errors"},
    "settings": BASE,
    "settings_loading": {*BASE, "settings", "yaml_lines"},
    "logger": {"errors"},
    "exceptions": {"errors"},
    "utils": {"backend"},
    "backend": {*BASE, "logger", "yaml_lines"},
    "loaders": {*BASE, "backend", "logger"},
    "broker": {*BASE, "settings", "yaml_lines", "certificates"},
    "asyncapi": {*BASE, "settings", "broker"},
    "formats": {"errors", "backend"},
    "observe": {*BASE, "settings", "certificates"},
    "testing": {
        *BASE,
        "settings",
        "settings_loading",
        "backend",
        "loaders",
        "broker",
        "formats",
        "observe",
        "runtime",
        "replay",
    },
    "runtime": {*BASE, "settings", "backend", "loaders", "broker", "formats", "observe"},
    "record_lines": {"records"},
    "replay": {
        *BASE,
        "record_lines",
        "settings",
        "settings_loading",
        "backend",
        "loaders",
        "broker",
        "formats",
        "runtime",
    },
    "integrations": {*BASE, "settings", "settings_loading", "broker", "runtime"},
    "stats": {*BASE, "settings", "broker", "observe"},
    "estimate": {*BASE, "settings", "backend", "loaders", "runtime", "replay"},
    "simulation": {*BASE, "settings", "backend", "runtime", "replay"},
}
STAGES = {
    *("source", "measuring", "measurer", "batcher", "pool", "worker", "isolation", "circuit", "sequencer", "sink"),
    "ledger",
    "requests",
}
WIRING = {"task_stream", "executions", "processor", "inspection", "reload", "app"}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, in full."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(name_of(path))
    if part not in MAY_IMPORT:
        assert part in {"", "cli", "demo", "__main__"}, f"say in this test what {part} may import"
        return
    for imported in imports(path):
        if imported.startswith("streamproc."):
            target = part_of(imported)
            assert target == part or target in MAY_IMPORT[part], f"{name_of(path)} imports {imported}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "runtime").glob("*.py")), ids=name_of)
def test_stages_do_not_import_each_other(path: Path) -> None:
    if path.stem in WIRING:
        return
    for imported in imports(path):
        if imported.startswith("streamproc.runtime."):
            stage = imported.split(".")[2]
            assert stage == path.stem or stage not in STAGES | WIRING, f"{path.stem} imports {imported}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "runtime").glob("window_*.py")), ids=name_of)
def test_the_batchers_strategies_do_not_import_each_other(path: Path) -> None:
    assert not [it for it in imports(path) if it.split(".")[2:3] != [path.stem] and ".window_" in it]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_kafka_client_is_imported_by_the_broker_folder_only(path: Path) -> None:
    if part_of(name_of(path)) != "broker":
        assert not [imported for imported in imports(path) if imported.split(".")[0] == "aiokafka"]


def test_the_file_map_names_every_module_and_nothing_else() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    section = text.split("## The files", 1)[1].split("\n## ", 1)[0]
    named = re.findall(r"^\| `(streamproc/[^`]+\.py)` \|", section, re.MULTILINE)
    present = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if path.name != "__init__.py" or len(path.read_text().splitlines()) > 15
    ]
    assert sorted(named) == sorted(present)
    assert len(named) == len(set(named))
