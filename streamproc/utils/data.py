"""packflow's helpers for records, under packflow's names and with its arguments.

For backends that call them in their own steps. The rules are those of ``streamproc.backend.paths``; the preprocessors
do not go through here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamproc.backend.paths import find_collisions, flatten_record, read_field, write_field


def check_delimiter_collisions(obj: dict[Any, Any], delimiter: str, path: str = "") -> list[str]:
    """The paths of the keys that have the delimiter in them."""
    return find_collisions(obj, delimiter, path)


def get_nested_field_direct(obj: dict[Any, Any], field: str, delimiter: str = ".") -> Any:
    """The value at a nested path, or None."""
    return read_field(obj, field, delimiter)


def set_nested_field_direct(obj: dict[Any, Any], field: str, value: Any, delimiter: str = ".") -> None:
    """Set the value at a nested path, in place; does nothing where a value that is no dict is in the way."""
    write_field(obj, field, value, delimiter)


def get_nested_field(obj: dict[Any, Any], field: str, delimiter: str | None = None) -> Any:
    """The value under a key, or else under that name once the record is flattened, or None."""
    return obj[field] if field in obj else flatten_record(obj, delimiter or ".").get(field)


def records_to_ndarray(
    records: list[dict[Any, Any]], feature_names: list[str], dtype: Any = None, delimiter: str | None = None
) -> np.ndarray[Any, Any]:
    """Rows by features, None for what is missing.

    Raises:
        ValueError: ``records`` is no list of dicts.
    """
    if not isinstance(records, list):
        raise ValueError(f"records must be a list of dicts, not {type(records).__name__}")  # noqa: TRY004 packflow's
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            name = type(record).__name__
            raise ValueError(f"the record at index {index} is not a dict but {name}")  # noqa: TRY004 packflow's
    rows = [[get_nested_field(record, feature, delimiter) for feature in feature_names] for record in records]
    return np.array(rows, dtype=dtype)


def flatten_dict(obj: dict[Any, Any], delimiter: str = ".", flatten_lists: bool = False) -> dict[Any, Any]:
    """The flat record.

    Raises:
        TypeError: ``obj`` is no dict.
        ValueError: Two values would have one name.
    """
    if not isinstance(obj, dict):
        raise TypeError(f"obj must be a dict, not {type(obj).__name__}")
    return flatten_record(obj, delimiter, flatten_lists=flatten_lists)


def flatten_records(
    records: list[dict[Any, Any]],
    delimiter: str = ".",
    flatten_lists: bool = False,
) -> list[dict[Any, Any]]:
    """The flat records.

    Raises:
        TypeError: ``records`` is no list, or one of its items no dict.
        ValueError: Two values of a record would have one name.
    """
    if not isinstance(records, list):
        raise TypeError(f"records must be a list, not {type(records).__name__}")
    return [flatten_dict(record, delimiter, flatten_lists) for record in records]
