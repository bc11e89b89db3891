"""What a nested field's name means: reading, writing, flattening, and finding keys that make names ambiguous.

These functions define the behaviour; they work on any record and any name. The compiled plans beside them must
agree with them on every record that they accept, and hand the others over. With ``delimiter="."`` the name ``a.b``
is the key ``a.b`` of the record, if it has one, or else the key ``b`` of the dict under its key ``a``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def read_field(record: Any, field: Any, delimiter: str) -> Any:
    """The value that ``field`` names, or None."""
    if field in record:
        return record[field]
    value = record
    for part in field.split(delimiter):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def write_field(record: dict[Any, Any], field: Any, value: Any, delimiter: str) -> None:
    """Set what ``field`` names, making dicts on the way; does nothing where something else is in the way."""
    *parents, last = field.split(delimiter)
    target = record
    for part in parents:
        if part not in target:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            return
    target[last] = value


def find_collisions(record: Mapping[Any, Any], delimiter: str, parent: str = "") -> list[str]:
    """The paths of all keys that have the delimiter in them, dicts in dicts included."""
    found = []
    for key, value in record.items():
        path = f"{parent}{delimiter}{key}" if parent else key
        if delimiter in key:
            found.append(path)
        if isinstance(value, dict):
            found += find_collisions(value, delimiter, path)
    return found


def flatten_record(record: Any, delimiter: str, *, flatten_lists: bool = False) -> dict[Any, Any]:
    """Nested mappings (and lists) to one dict of names. Empty dicts and lists stay as values.

    Raises:
        ValueError: The record is no mapping, or two of its values would have one name.
    """
    containers: tuple[type, ...] = (Mapping, list) if flatten_lists else (Mapping,)
    if not isinstance(record, containers):
        raise ValueError(f"only a dict can be flattened, not {type(record).__name__}")  # noqa: TRY004 packflow's type
    flat: dict[Any, Any] = {}

    def visit(container: Any, parent: Any) -> bool:
        items: Iterable[tuple[Any, Any]] = (
            enumerate(container) if flatten_lists and isinstance(container, list) else container.items()
        )
        has_items = False
        for key, value in items:
            has_items = True
            # At the top a key stays what it is, a number for instance; below, names are text.
            name = key if parent is None else f"{parent}{delimiter}{key}"
            if isinstance(value, containers) and (visit(value, name) or not isinstance(value, dict | list)):
                continue
            if name in flat:
                raise ValueError(f"two values of a record have the name {name!r} once it is flattened")
            flat[name] = value
        return has_items

    visit(record, None)
    return flat


def copy_dicts(value: Any, copies: dict[int, dict[Any, Any]]) -> Any:
    """``value`` with every dict in it (dicts in dicts, not in lists) copied once; ``copies`` keeps who became whom.

    For outputs that are written into below a value that belongs to the input: what the input shares stays shared.
    """
    if not isinstance(value, dict):
        return value
    known = copies.get(id(value))
    if known is None:
        known = copies[id(value)] = value.copy()
        for key, item in value.items():
            if isinstance(item, dict):
                known[key] = copy_dicts(item, copies)
    return known
