"""How the records preprocessor does what its configuration asks: four plans, chosen once, at construction.

``ReferencePlan`` follows the rules literally, whatever the names and records are. The others are for the common
configurations and for ordinary records; they hand any other record to it. Invariants: a plan's outputs, and its
exceptions, are those of ``ReferencePlan`` on the same batch; and no plan ever edits its input.

The rules: renamed fields come first, in their order, then the features in theirs, each unless a field of that name
is there already; without features, the whole record follows. What is missing or None is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, Protocol

from streamproc.backend.compiled import compile_flat_selection, compile_nested_selection
from streamproc.backend.configuration import BackendConfig
from streamproc.backend.paths import copy_dicts, find_collisions, flatten_record, read_field, write_field
from streamproc.backend.shapes import Flattener, PlainRecords, read_plain
from streamproc.errors import PreprocessorRuntimeError


class Plan(Protocol):
    """Turns a batch of records into a batch of records."""

    def __call__(self, records: Sequence[Any], /) -> list[Any]:
        """The records as the configuration asks for them."""


def choose_plan(config: BackendConfig) -> Plan:
    """The fastest plan that is right for the configuration."""
    names = [*config.rename_fields, *config.rename_fields.values(), *config.feature_names]
    delimiter = config.nested_field_delimiter
    # packflow takes other names too, and fails, if at all, while it works on a batch.
    if delimiter == "" or not all(type(name) is str for name in names):
        return ReferencePlan(config)
    if config.flatten_nested_inputs:
        return FlattenPlan(config)
    if any(delimiter in name for name in names):
        return NestedPlan(config)
    return FlatPlan(config)


class ReferencePlan:
    """The rules, literally. What it raises for a record is what every plan raises for it."""

    def __init__(self, config: BackendConfig) -> None:
        self._config = config
        self._delimiter = config.nested_field_delimiter
        self._writes_into_values = _writes_into_values(config)

    def __call__(self, records: Sequence[Any], /) -> list[Any]:
        """The records as the configuration asks for them."""
        if self.uses_nested_names() and not self._config.flatten_nested_inputs:
            for record in records:
                self.refuse_collisions(record)
        return self.select_all(records)

    def uses_nested_names(self) -> bool:
        """Whether a field to read has the delimiter in its name; new names do not count."""
        names = [*self._config.rename_fields, *self._config.feature_names]
        return any(self._delimiter in name for name in names)

    def refuse_collisions(self, record: Any) -> None:
        """Raise if a key of the record has the delimiter in it, unless the configuration accepts that."""
        if self._config.ignore_delimiter_collisions:
            return
        collisions = find_collisions(record, self._delimiter)
        if collisions:
            raise PreprocessorRuntimeError(
                f"input keys contain the delimiter {self._delimiter!r}, so that names are ambiguous: {collisions}; "
                "rename them, set another nested_field_delimiter, or set ignore_delimiter_collisions"
            )

    def select_all(self, records: Sequence[Any]) -> list[Any]:
        """The rules without the check for collisions."""
        copies: dict[int, dict[Any, Any]] = {}
        return [self._select(record, copies) for record in records]

    def _select(self, record: Any, copies: dict[int, dict[Any, Any]]) -> dict[Any, Any]:
        deep = self._writes_into_values and isinstance(record, dict)
        # The shallow copy is there to refuse what is not even a container, with packflow's exception.
        source = copy_dicts(record, copies) if deep else record.copy()
        if self._config.flatten_nested_inputs:
            flat = flatten_record(source, self._delimiter, flatten_lists=self._config.flatten_lists)
            return _select_flat(flat, list(self._config.rename_fields.items()), self._config.feature_names)
        return self._select_nested(source)

    def _select_nested(self, source: Any) -> dict[Any, Any]:
        delimiter = self._delimiter
        selected: dict[Any, Any] = {}
        for field, new_name in self._config.rename_fields.items():
            value = read_field(source, field, delimiter)
            if value is not None:
                self._put(selected, new_name, value)
        for feature in self._config.feature_names:
            if read_field(selected, feature, delimiter) is None:
                value = read_field(source, feature, delimiter)
                if value is not None:
                    self._put(selected, feature, value)
        if not self._config.feature_names:
            selected.update(source)
        return selected

    def _put(self, selected: dict[Any, Any], name: Any, value: Any) -> None:
        if self._delimiter in name:
            write_field(selected, name, value, self._delimiter)
        else:
            selected[name] = value


class FlattenPlan:
    """Flatten, then rename and filter by flat names. Where only some names are asked for, plain records stay nested."""

    def __init__(self, config: BackendConfig) -> None:
        self._renames = list(config.rename_fields.items())
        self._features = config.feature_names
        self._reference = ReferencePlan(config)
        delimiter = config.nested_field_delimiter
        self._flatten_all = Flattener(delimiter, flatten_lists=config.flatten_lists).flatten_all
        self._only_flattens = not config.rename_fields and not config.feature_names
        # A list that is flattened has names too, which a plain record does not tell.
        self._reads_names = bool(config.feature_names) and not config.flatten_lists
        self._plain = PlainRecords(delimiter)
        self._paths = {name: name.split(delimiter) for name in [*config.rename_fields, *config.feature_names]}
        provided = set(config.rename_fields.values())
        fields = [(new, old) for old, new in self._renames]
        fields += [(name, name) for name in dict.fromkeys(config.feature_names) if name not in provided]
        self._select_given = compile_nested_selection(
            [((new,), self._paths[old]) for new, old in fields], keeps_all=False, refuses_dicts=True
        )

    def __call__(self, records: Sequence[Any], /) -> list[Any]:
        """The records as the configuration asks for them."""
        if not set(map(type, records)) <= {dict}:
            return self._reference(records)
        if self._reads_names:
            all_plain = self._plain.has_all(records)
            return [self._select(record, is_plain=all_plain or self._plain.has(record)) for record in records]
        flattened = self._flatten_all(records)
        if self._only_flattens:
            return flattened
        return [_select_flat(flat, self._renames, self._features) for flat in flattened]

    def _select(self, record: dict[Any, Any], *, is_plain: bool) -> dict[Any, Any]:
        if not is_plain:
            (flat,) = self._flatten_all([record])
        elif (selected := self._select_given(record)) is not None:
            return selected
        else:
            flat = {name: read_plain(record, path) for name, path in self._paths.items()}
        return _select_flat(flat, self._renames, self._features)


class FlatPlan:
    """No name is nested: every field is a key of the record."""

    def __init__(self, config: BackendConfig) -> None:
        self._select_slowly = ReferencePlan(config).select_all
        renames, features = config.rename_fields, config.feature_names
        new_names = set(renames.values())
        fields = [(new, old) for old, new in renames.items()]
        fields += [(feature, feature) for feature in dict.fromkeys(features) if feature not in new_names]
        # A feature that a rename provides is read from its own name only where the rename finds nothing.
        self._select_all = compile_flat_selection(
            fields, keeps_all=not features, has_fallbacks=not new_names.isdisjoint(features)
        )

    def __call__(self, records: Sequence[Any], /) -> list[Any]:
        """The records as the configuration asks for them."""
        return self._select_all(records, self._select_slowly)


class NestedPlan:
    """Some name is nested. For plain records (see ``PlainRecords``), where a name can mean one thing only."""

    def __init__(self, config: BackendConfig) -> None:
        self._reference = ReferencePlan(config)
        self._plain = PlainRecords(config.nested_field_delimiter)
        self._checks_collisions = self._reference.uses_nested_names() and not config.ignore_delimiter_collisions
        self._keeps_all = not config.feature_names
        renames, features = config.rename_fields, dict.fromkeys(config.feature_names)
        # Where one name lies within another, the values of the first decide what becomes of the second.
        self._is_intricate = _nests([*renames.values(), *features], config.nested_field_delimiter)
        provided = set(renames.values())
        split = config.nested_field_delimiter
        self._steps = [_Step(old.split(split), new.split(split), is_fallback=False) for old, new in renames.items()]
        self._steps += [_Step(name.split(split), name.split(split), is_fallback=name in provided) for name in features]
        # Where nothing is missing no fallback is needed.
        fields = [([*step.parents, step.last], step.source) for step in self._steps if not step.is_fallback]
        self._select_given = compile_nested_selection(
            [] if self._is_intricate else fields, keeps_all=self._keeps_all, refuses_dicts=False
        )

    def __call__(self, records: Sequence[Any], /) -> list[Any]:
        """The records as the configuration asks for them."""
        if self._is_intricate:
            return self._reference(records)
        all_plain = self._plain.has_all(records)
        plain: Iterable[bool] = repeat(True) if all_plain else [self._plain.has(record) for record in records]
        if not all_plain and self._checks_collisions:
            for record in records:
                self._reference.refuse_collisions(record)
        selected: list[Any] = []
        for record, is_plain in zip(records, plain):  # noqa: B905 - one of them has no end
            if is_plain:
                given = self._select_given(record)
                selected.append(self._select(record) if given is None else given)
            else:
                selected += self._reference.select_all([record])
        return selected

    def _select(self, record: dict[str, Any]) -> dict[str, Any]:
        selected: dict[str, Any] = {}
        for step in self._steps:
            if step.is_fallback and step.is_written(selected):
                continue
            value: Any = record
            try:
                for part in step.source:
                    value = value[part]
            except (KeyError, TypeError):
                # TypeError: a leaf where the name expects a dict. In a plain record a leaf takes no text as its index.
                continue
            if value is None:
                continue
            target = selected
            for part in step.parents:
                target = target.setdefault(part, {})
            target[step.last] = value
        if self._keeps_all:
            selected.update(record)
        return selected


class _Step:
    """One field's way from the record to the output. A fallback is for a name that a rename may have provided."""

    __slots__ = ("is_fallback", "last", "parents", "source")

    def __init__(self, source: list[str], target: list[str], *, is_fallback: bool) -> None:
        self.source = source
        self.parents = target[:-1]
        self.last = target[-1]
        self.is_fallback = is_fallback

    def is_written(self, selected: dict[str, Any]) -> bool:
        for part in self.parents:
            if part not in selected:
                return False
            selected = selected[part]
        return self.last in selected


def _select_flat(flat: dict[Any, Any], renames: list[tuple[Any, Any]], features: list[str]) -> dict[Any, Any]:
    """Rename and filter a record that is flat: every name is a key."""
    selected: dict[Any, Any] = {}
    for field, new_name in renames:
        value = flat.get(field)
        if value is not None:
            selected[new_name] = value
    for feature in features:
        if feature not in selected:
            value = flat.get(feature)
            if value is not None:
                selected[feature] = value
    if not features:
        selected.update(flat)
    return selected


def _writes_into_values(config: BackendConfig) -> bool:
    """Whether a nested name may be written below a value that came from the record, and would edit the input."""
    delimiter = config.nested_field_delimiter
    names = [*config.rename_fields.values(), *config.feature_names]
    if config.flatten_nested_inputs or delimiter == "":
        return False
    return _nests([name for name in names if isinstance(name, str)], delimiter)


def _nests(names: Sequence[str], delimiter: str) -> bool:
    """Whether a name lies within another, as ``a.b`` within ``a``."""
    paths = {tuple(name.split(delimiter)) for name in names}
    return any(path[:size] in paths for path in paths for size in range(1, len(path)))
