"""Functions compiled for the field names of one configuration: they read fields, and build records of them, in no loop.

Straight code needs half the time of a loop over names, for every record. Field names go into the source as literals of
exact ``str``, never as code. Invariants: nothing is compiled for a record's data, only for a configuration, once, at
construction; and whatever a record lacks is left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Path = Sequence[str]
"""The keys from a record to a value in it, one below the other."""

Tree = dict[str, "str | Tree"]
Rows = Callable[[Iterable[dict[Any, Any]]], list[tuple[Any, ...]]]
FlatSelection = Callable[[Sequence[Any], Callable[[list[Any]], list[Any]]], list[Any]]
NestedSelection = Callable[[dict[str, Any]], dict[str, Any] | None]


def compile_rows(paths: Sequence[Path]) -> Rows:
    """``rows(records)``: the values at the paths, a tuple for each record.

    Raises KeyError or TypeError where a record has no such value. A record is left out where there is a dict below a
    key of it: flattened, it would be no value.
    """
    nested = [index for index, path in enumerate(paths) if len(path) > 1]
    values = "".join(f"v{index}, " if index in nested else f"{_read(path)}, " for index, path in enumerate(paths))
    condition = " and ".join(f"type(v{index} := {_read(paths[index])}) is not dict" for index in nested)
    rows: Rows = _function(
        "rows", ["def rows(records):", f" return [({values}) for r in records if {condition or True}]"]
    )
    return rows


def compile_flat_selection(fields: Sequence[tuple[str, str]], *, keeps_all: bool, has_fallbacks: bool) -> FlatSelection:
    """``select(records, select_slowly)``: of each record the fields that it has and that are not None, in their order.

    A field is its name in the new record and its key in the old one. With ``keeps_all`` the whole record follows.
    ``select_slowly`` gets what is no exact dict, and with ``has_fallbacks`` each record that lacks a field.
    """
    each = range(len(fields))
    lines = [
        "def select(records, select_slowly):",
        " selected = []",
        " for r in records:",
        "  if type(r) is not dict:",
        "   selected += select_slowly([r])",
        "   continue",
        "  try:",
        "   pass",
        *[f"   v{index} = r[{key!r}]" for index, (_, key) in enumerate(fields)],
        "  except KeyError:",
        # For the fallbacks it is enough that one is None.
        *(["   v0 = None"] if has_fallbacks else [f"   v{index} = r.get({fields[index][1]!r})" for index in each]),
        "   pass",
        f"  if {_all_given(each)}:",
        f"   selected.append({_display({name: f'v{at}' for at, (name, _) in enumerate(fields)}, keeps_all=keeps_all)})",
        "   continue",
    ]
    if has_fallbacks:
        lines.append("  selected += select_slowly([r])")
    else:
        lines.append("  kept = {}")
        lines += [f"  if v{index} is not None: kept[{name!r}] = v{index}" for index, (name, _) in enumerate(fields)]
        lines += ["  kept.update(r)"] if keeps_all else []
        lines.append("  selected.append(kept)")
    select: FlatSelection = _function("select", [*lines, " return selected"])
    return select


def compile_nested_selection(
    fields: Sequence[tuple[Path, Path]], *, keeps_all: bool, refuses_dicts: bool
) -> NestedSelection:
    """``select(record)``: a new record with a value at each of the first paths, from the second ones of the old record.

    None where a value is missing or None, or with ``refuses_dicts`` a dict. With ``keeps_all`` the whole record
    follows. No new path may lie within another.
    """
    tree: Tree = {}
    for index, (target, _) in enumerate(fields):
        branch: Any = tree
        for part in target[:-1]:
            branch = branch.setdefault(part, {})
        branch[target[-1]] = f"v{index}"
    each = range(len(fields))
    refused = "".join([f" and type(v{index}) is not dict" for index in each]) if refuses_dicts else ""
    lines = [
        "def select(r):",
        " try:",
        "  pass",
        *[f"  v{index} = {_read(source)}" for index, (_, source) in enumerate(fields)],
        " except (KeyError, TypeError):",
        "  return None",
        f" if {_all_given(each)}{refused}:",
        f"  return {_display(tree, keeps_all=keeps_all)}",
        " return None",
    ]
    select: NestedSelection = _function("select", lines)
    return select


def _read(path: Path) -> str:
    return "r" + "".join(f"[{part!r}]" for part in path)


def _all_given(each: Iterable[int]) -> str:
    return " and ".join(["True", *(f"v{index} is not None" for index in each)])


def _display(tree: Tree, *, keeps_all: bool = False) -> str:
    items = [f"{name!r}: {value if isinstance(value, str) else _display(value)}" for name, value in tree.items()]
    return "{" + ", ".join([*items, "**r"] if keeps_all else items) + "}"


def _function(name: str, lines: Sequence[str]) -> Any:
    namespace: dict[str, Any] = {}
    code = compile("\n".join(lines), "<streamproc, compiled for a configuration>", "exec")
    exec(code, namespace)  # noqa: S102 - the names in it are literals
    return namespace[name]
