"""The settings' data, of file and environment together, before validation; every part of it knows its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamproc.errors import SettingsError
from streamproc.settings_loading.explain import kind_of
from streamproc.settings_loading.model_walk import Loc, model_at
from streamproc.yaml_lines import load_yaml


@dataclass(slots=True)
class Source:
    """The data of file and environment together, and the place of each part of it."""

    path: Path
    data: dict[str, Any]
    file_place: Callable[[Loc], str]
    variables: dict[Loc, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Source:
        """The data of a file, which must exist and hold keys and values."""
        if os.path.isdir(path):  # noqa: PTH112 - Path's own raises for names too long
            raise SettingsError("is a folder", place=str(path), hint="name the settings file in it")
        if not os.path.exists(path):  # noqa: PTH110 - as above
            raise SettingsError(
                f"there is no settings file {path}", hint="create it, or name another with --config FILE"
            )
        data, place_of = load_yaml(path)
        if data is None:
            raise SettingsError("is empty", place=str(path), hint="it needs at least name, backend and tasks")
        if not isinstance(data, dict):
            raise SettingsError(
                f"expected keys and values at the top, got {kind_of(data)}",
                place=place_of(()),
                hint="begin with a line such as `name: my-application`",
            )
        return cls(path, data, place_of)

    def set(self, loc: tuple[str, ...], value: object, variable: str) -> None:
        """Lay a variable's value over the file's. A section that is given as JSON is merged, key by key."""
        node = self.data
        for depth, key in enumerate(loc[:-1], start=1):
            if node.get(key) is None:
                node[key] = {}
                self.variables[loc[:depth]] = variable
            if node[key] in getattr(model_at(loc[:depth]), "short_forms", ()):
                node[key] = {}  # the word stands for a section, of which the variable sets a key
            if not isinstance(node[key], dict):
                return  # the file is wrong here; validation says so, at the file's line
            node = node[key]
        if isinstance(value, dict) and isinstance(node.get(loc[-1]), dict):
            for key, inner in value.items():
                self.set((*loc, str(key)), inner, variable)
            return
        node[loc[-1]] = value
        for inside in [known for known in self.variables if known[: len(loc)] == loc]:
            del self.variables[inside]
        for inside in _locs(value, loc):
            self.variables[inside] = variable

    def known_part(self, loc: Loc) -> Loc:
        """The longest beginning of ``loc`` that was set somewhere."""
        node: Any = self.data
        for depth, key in enumerate(loc):
            try:
                node = node[key]
            except (KeyError, IndexError, TypeError):
                return loc[:depth]
        return loc

    def place(self, loc: Loc) -> str:
        """The place of a setting, or of the nearest section around it that was set."""
        known = self.known_part(loc)
        if known in self.variables:
            return f"environment variable {self.variables[known]}"
        return self.file_place(known)

    def place_of(self, loc: Loc) -> str:
        """The place of a setting, or ``default``."""
        if self.known_part(loc) == loc:
            return self.place(loc)
        of_all: Loc = ("batch", *loc[3:])
        if loc[:1] == ("tasks",) and loc[2:3] == ("batch",) and self.known_part(of_all) == of_all != ("batch",):
            return self.place(of_all)
        return "default"

    def value(self, loc: Loc) -> object:
        """What was set. Raises KeyError or TypeError where nothing was."""
        node: Any = self.data
        for key in loc:
            node = node[key]
        return node


def _locs(value: object, loc: Loc) -> Iterator[Loc]:
    yield loc
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _locs(inner, (*loc, key))
