"""Nothing that comes from outside is ever code: no pickle, no marshal that reads, no shell, no unsafe YAML."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "streamproc").rglob("*.py"))
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "jsonpickle"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "input"),
    *("marshal.load", "marshal.loads", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "numpy.load", "np.load"),
    *("torch.load", "pandas.read_pickle"),
}
ALLOWED = {
    # Source that is made of quoted literals; the module says which.
    ("streamproc/backend/compiled.py", "compile"),
    ("streamproc/backend/compiled.py", "exec"),
}


def called(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=[str(it.relative_to(ROOT)) for it in SOURCES])
def test_a_module_runs_and_unpickles_nothing(path: Path) -> None:
    name, tree = str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        imported = [it.name for it in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not MODULES & {it.partition(".")[0] for it in imported}, f"line {getattr(node, 'lineno', 0)}"
    for function, call in called(tree):
        assert function not in CALLS or (name, function) in ALLOWED, f"line {call.lineno}: {function}"
        options = {it.arg: ast.unparse(it.value) for it in call.keywords}
        assert options.get("shell", "False") == "False", f"line {call.lineno}"
        assert options.get("allow_pickle", "False") == "False", f"line {call.lineno}"
        assert function != "yaml.load" or "Safe" in options.get("Loader", ""), f"line {call.lineno}"


def test_yaml_is_read_by_loaders_that_make_plain_values_only() -> None:
    found = {name for path in SOURCES for name in re.findall(r"\bC?\w*Loader\b", yaml_lines_of(path))}
    assert found == {"SafeLoader", "CSafeLoader", "_Loader"}


def yaml_lines_of(path: Path) -> str:
    """The lines about loaders of a module that imports yaml."""
    text = path.read_text(encoding="utf-8")
    if not re.search(r"^\s*(import yaml|from yaml import)", text, re.MULTILINE):
        return ""
    return "\n".join(line for line in text.splitlines() if "Loader" in line and "InferenceBackendLoader" not in line)


def test_the_linter_looks_for_it_too_with_every_rule_of_its_security_set() -> None:
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert "S" in lint["select"]
    assert not [it for it in lint["ignore"] if it.startswith("S") and it[1:].isdigit()]
    silenced = {
        rule
        for path in SOURCES
        for found in re.findall(r"# noqa: ([A-Z0-9, ]+)", path.read_text(encoding="utf-8"))
        for rule in re.split(r"[, ]+", found)
        if re.fullmatch(r"S\d+", rule)
    }
    # assert, an address in a table, seeded choices, our own commands, and the one exec.
    assert silenced <= {"S101", "S102", "S104", "S311", "S603"}, silenced
