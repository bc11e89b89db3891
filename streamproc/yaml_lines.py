"""Reads YAML so that whoever finds a value wrong can say in which line it stands.

Only plain data comes out of a file: text, numbers, booleans, dates, null, lists and mappings. What YAML allows and a
settings file must not say is refused: a key given twice, of which the first would be lost silently, and what would take
forever or end the process to read, a bomb of aliases or merges, or nesting without end.

Invariant: no message repeats a value of the file; it may be a password that lacks a quote.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from streamproc.errors import SettingsError

PlaceOf = Callable[[Sequence[str | int]], str]
"""Gives ``file:line`` for a path of keys and list positions, or for the nearest part of it that the file has."""

_MAX_BYTES = 1_048_576
_MAX_NODES = 100_000
MAX_DEPTH = 64
_MAX_NUMBER_CHARS = 100
_TAG = "tag:yaml.org,2002:"
_MERGE_TAG = f"{_TAG}merge"
_PARSED = {f"{_TAG}{kind}" for kind in ("int", "float", "timestamp", "bool")}
_PLAIN = {*_PARSED, *(f"{_TAG}{kind}" for kind in ("str", "null", "map", "seq"))}

try:
    from yaml import CSafeLoader as _Loader
except ImportError:  # PyYAML was built without libyaml
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]


def load_yaml(path: Path) -> tuple[Any, PlaceOf]:
    """The data in a file, None for an empty one, and where each part of it stands.

    Raises:
        SettingsError: the file cannot be read, is no YAML, holds several documents, has a key twice, or is too large,
            too deep or made of anything but plain data.
    """
    text = _read(path)
    _check_depth(path, text)
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # characters that YAML does not allow are found at once
        raise _broken(path, text, error) from error
    try:
        root = loader.get_single_node()
        if root is None:
            return None, lambda _: str(path)
        index = _Index(path, loader)
        index.walk(root, ())
        return loader.construct_document(root), index.place_of
    except yaml.YAMLError as error:
        raise _broken(path, text, error) from error
    finally:
        loader.dispose()


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise SettingsError(f"the file has more than {_MAX_BYTES} bytes", place=str(path), hint="name another")
        return content.decode("utf-8")
    except OSError as error:
        raise SettingsError(
            f"the file cannot be read: {error.strerror}", place=str(path), hint="correct its path or its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError("the file is not UTF-8 text", place=str(path), hint="save it as UTF-8") from error


def _check_depth(path: Path, text: str) -> None:
    """Refuse what is nested too deeply; composing it would overflow the stack of libyaml's binding."""
    depth = 0
    try:
        for event in yaml.parse(text, _Loader):
            mark: Any = event.start_mark
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    raise SettingsError(
                        f"this is nested more than {MAX_DEPTH} levels deep",
                        place=f"{path}:{mark.line + 1}",
                        hint="write it flatter",
                    )
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
    except yaml.YAMLError as error:
        raise _broken(path, text, error) from error


def _broken(path: Path, text: str, error: yaml.YAMLError) -> SettingsError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        line = mark.line + 1
    else:
        position = getattr(error, "position", None)
        line = text.count("\n", 0, position) + 1 if position is not None else 1
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    context = getattr(error, "context", None)
    return SettingsError(
        f"this is not valid YAML: {f'{context}, ' if context else ''}{problem}",
        place=f"{path}:{line}",
        hint="see the indentation, colons and quotes here and in the line before",
    )


class _Index:
    """The line of every path in a document."""

    def __init__(self, path: Path, loader: Any) -> None:
        self._path = path
        self._loader = loader
        self._lines: dict[tuple[Hashable, ...], int] = {}
        self._open: set[int] = set()
        self._visits = 0

    def place_of(self, loc: Sequence[str | int]) -> str:
        """``file:line`` of a path, or of its longest part that is known."""
        parts = tuple(loc)
        while parts not in self._lines and parts:
            parts = parts[:-1]
        return f"{self._path}:{self._lines.get(parts, 1)}"

    def walk(self, node: yaml.Node, at: tuple[Hashable, ...], line: int | None = None) -> None:
        """Note the lines of a node and of everything in it; ``line`` is that of its key."""
        self._lines.setdefault(at, node.start_mark.line + 1 if line is None else line)
        if node.tag not in _PLAIN:
            raise self._refusal(node, "a value has a tag, or is a lone =", "put it in quotes, or leave the ! out")
        self._enter(node)
        if isinstance(node, yaml.MappingNode):
            self._walk_mapping(node, at)
        elif isinstance(node, yaml.SequenceNode):
            for position, item in enumerate(node.value):
                self.walk(item, (*at, position))
        elif node.tag in _PARSED:
            self._parse(node)
        self._open.discard(id(node))

    def _enter(self, node: yaml.Node) -> None:
        """Count a visit to a node, which is in no part of itself."""
        if id(node) in self._open:
            raise self._refusal(node, "this part contains itself", "write it out without the alias")
        self._visits += 1
        if self._visits > _MAX_NODES:
            raise self._refusal(node, f"the file has more than {_MAX_NODES} parts", "use fewer aliases")
        self._open.add(id(node))

    def _parse(self, node: yaml.Node) -> None:
        try:
            if len(node.value) <= _MAX_NUMBER_CHARS:
                self._loader.construct_object(node)
                return
        except (ValueError, OverflowError, LookupError, AttributeError):
            pass  # what PyYAML raises for 2001-99-99 and for tags that do not fit
        raise self._refusal(node, "this looks like a number or a date, and is none", "put it in quotes if it is text")

    def _walk_mapping(self, node: yaml.MappingNode, at: tuple[Hashable, ...]) -> None:
        seen: dict[Hashable, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE_TAG:
                merged.extend(value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node])
                continue
            line = key_node.start_mark.line + 1
            key = self._key(key_node)
            if key in seen:
                raise self._refusal(
                    key_node, f"{key!r} is given twice, first in line {seen[key]}", "keep one of the two"
                )
            seen[key] = line
            self.walk(value_node, (*at, key), line)
        # What is merged in stands where it was written, unless it is overridden here, which setdefault sees to.
        for source in merged:
            self._merge(source, at)

    def _merge(self, source: yaml.Node, at: tuple[Hashable, ...]) -> None:
        if not isinstance(source, yaml.MappingNode):
            raise self._refusal(source, "only mappings can be merged", "write it out without <<")
        self._enter(source)
        for key_node, value_node in source.value:
            if key_node.tag == _MERGE_TAG:
                for inner in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    self._merge(inner, at)
            else:
                self.walk(value_node, (*at, self._key(key_node)), key_node.start_mark.line + 1)
        self._open.discard(id(source))

    def _key(self, node: yaml.Node) -> Hashable:
        if not isinstance(node, yaml.ScalarNode):
            raise self._refusal(node, "a key is a list or a mapping", "keys are plain words")
        if node.tag not in _PLAIN:
            raise self._refusal(node, "a key has a tag, or is a lone =", "put it in quotes, or leave the ! out")
        if node.tag in _PARSED:
            self._parse(node)
        return cast("Hashable", self._loader.construct_object(node))

    def _refusal(self, node: yaml.Node, problem: str, hint: str) -> SettingsError:
        return SettingsError(problem, place=f"{self._path}:{node.start_mark.line + 1}", hint=hint)
