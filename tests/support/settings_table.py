"""The settings table of the README, from the models: ``python -m tests.support.settings_table`` writes it."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from streamproc.settings import Settings

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- settings: made by tests/support/settings_table.py -->", "<!-- end of settings -->"


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The section behind a field, also in a mapping or an option."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for it in typing.get_args(annotation) if (found := model_of(it)) is not None), None)


def default_of(field: FieldInfo) -> str:
    """A field's default as YAML would have it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined or value is None:
        return "none"
    plain = value.value if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value
    return f"`{json.dumps(plain)}`"


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A row per setting, sections unfolded; those that are alike beside each other, in braces."""
    alike: dict[type[BaseModel], list[str]] = {}
    for name, field in model.model_fields.items():
        if (section := model_of(field.annotation)) is not None:
            alike.setdefault(section, []).append(name)
    for name, field in model.model_fields.items():
        section = model_of(field.annotation)
        if section is not None and alike[section][0] != name:
            continue
        if section is None:
            text = " ".join((field.description or "").split())
            yield f"| `{prefix}{name}` | {default_of(field)} | {text} |"
        else:
            mapping = typing.get_origin(field.annotation) is dict
            names = name if len(alike[section]) == 1 else f"{{{','.join(alike[section])}}}"
            yield from rows(section, f"{prefix}{names}.{'<task>.' if mapping else ''}")


def table() -> str:
    """The whole table."""
    return "\n".join(["| setting | default | what it says |", "| --- | --- | --- |", *rows(Settings)])


def main() -> None:
    """Put the table where the README has its marks."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
