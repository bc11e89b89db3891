"""Fast walks over ordinary records: what JSON decodes to, with keys that repeat from record to record.

Both classes remember the keys they have met, so that a record of known keys costs no string work. Invariants: what is
remembered is bounded, since keys can be data (identifiers, dates) and a stream has no end; and a record that is out of
the ordinary is handed to ``paths``, so that the answer, or the exception, never depends on what was met before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from streamproc.backend.paths import flatten_record

# Values that no name reaches into. Tested by exact type: an instance of a subclass may be a mapping as well.
LEAVES: frozenset[type] = frozenset({str, int, float, bool, type(None), bytes, list, tuple})

# Keys remembered per preprocessor; each takes some hundred bytes.
MAX_REMEMBERED = 20_000

_INDEXES = [str(index) for index in range(64)]


class _OutOfTheOrdinaryError(Exception):
    """Stays within this module: the record is not one for the fast walk."""


class _Branch:
    """What is known of the keys of one container: their flat names, and the branches of the containers under them."""

    __slots__ = ("branches", "names", "prefix")

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.names: dict[str, str] = {}
        self.branches: dict[str, _Branch] = {}


class Flattener:
    """Flattens records as ``paths.flatten_record`` does, about eight times as fast."""

    def __init__(self, delimiter: str, *, flatten_lists: bool = False) -> None:
        self._delimiter = delimiter
        self._flatten_lists = flatten_lists
        self._leaves = LEAVES - {list} if flatten_lists else LEAVES
        self._root = _Branch("")
        self._room = MAX_REMEMBERED

    def flatten_all(self, records: Iterable[Any]) -> list[dict[Any, Any]]:
        """The flat records; raises what ``flatten_record`` raises."""
        flattened = []
        leaves, branches = self._leaves, self._root.branches
        for record in records:
            if type(record) is not dict:
                flattened.append(self._flatten_slowly(record))
                continue
            flat: dict[Any, Any] = {}
            values = len(record)
            try:
                # As _visit, but that a top key is its own name, whatever its type.
                for key, value in record.items():
                    if type(value) in leaves:
                        flat[key] = value
                    elif type(value) is dict and value:
                        values += _visit(value, branches[key], flat, leaves) - 1
                    elif type(value) is list and value:
                        values += _visit(_by_index(value), branches[key], flat, leaves) - 1
                    elif type(value) is dict or type(value) is list:
                        flat[key] = value
                    else:
                        raise _OutOfTheOrdinaryError  # noqa: TRY301 a call per record would cost a tenth
            except KeyError:
                # A key not met before. The slow walk takes this record; the next one like it finds the key known.
                self._learn(record, self._root)
                values = -1
            except _OutOfTheOrdinaryError:
                values = -1
            # Fewer names than values: two values have one name, and the slow walk raises and says which.
            flattened.append(flat if values == len(flat) else self._flatten_slowly(record))
        return flattened

    def _flatten_slowly(self, record: Any) -> dict[Any, Any]:
        return flatten_record(record, self._delimiter, flatten_lists=self._flatten_lists)

    def _learn(self, container: dict[Any, Any], branch: _Branch) -> None:
        for key, value in container.items():
            # Text only: 1, 1.0 and True are one key of a dict, but three names.
            if type(key) is not str or self._room <= 0:
                continue
            if key not in branch.names:
                self._room -= 1
                branch.names[key] = branch.prefix + key
            nested = _by_index(value) if type(value) is list and self._flatten_lists else value
            if type(nested) is dict and nested:
                if key not in branch.branches:
                    branch.branches[key] = _Branch(branch.names[key] + self._delimiter)
                self._learn(nested, branch.branches[key])


def _visit(container: dict[Any, Any], branch: _Branch, flat: dict[Any, Any], leaves: frozenset[type]) -> int:
    values = len(container)
    names = branch.names
    for key, value in container.items():
        if type(value) in leaves:
            flat[names[key]] = value
        elif type(value) is dict and value:
            values += _visit(value, branch.branches[key], flat, leaves) - 1
        elif type(value) is list and value:
            values += _visit(_by_index(value), branch.branches[key], flat, leaves) - 1
        elif type(value) is dict or type(value) is list:
            flat[names[key]] = value
        else:
            raise _OutOfTheOrdinaryError
    return values


def _by_index(items: list[Any]) -> dict[str, Any]:
    # "0" as a list's index and "0" as a dict's key give the same name, so that both can be looked up alike.
    if len(items) <= len(_INDEXES):
        return dict(zip(_INDEXES, items))  # noqa: B905 - the shorter one ends it; saying so takes time
    return {str(index): item for index, item in enumerate(items)}


class PlainRecords:
    """Tells the records in which a nested name can mean one thing only.

    In a plain record every key is text, none has the delimiter in it, and every value is a plain dict or a leaf.
    Following a name part by part then finds what looking it up in the flattened record would find.
    """

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter
        # "__" can begin in one key and end in the next ("a_" and "b" give "a___b"); "." cannot.
        self._overlaps = any(delimiter.startswith(delimiter[-size:]) for size in range(1, len(delimiter)))
        self._known: set[str] = set()
        self._knows_all = self._known.issuperset

    def has(self, record: Any) -> bool:
        """Whether the record is plain."""
        if type(record) is not dict:
            return False
        knows_all = self._knows_all
        containers: list[dict[Any, Any]] = [record]
        for container in containers:
            if not knows_all(container) and not self._learn(container):
                return False
            for value in container.values():
                if type(value) not in LEAVES:
                    if type(value) is not dict:
                        return False
                    # The loop goes on to it: appending is cheaper than calling.
                    containers.append(value)
        return True

    def has_all(self, records: Sequence[Any]) -> bool:
        """Whether every record is plain: for ordinary batches in less time than one by one."""
        level: Sequence[Any] = records
        while level:
            if not set(map(type, level)) <= {dict}:
                return False
            if not self._knows_all(chain.from_iterable(level)) and not all(map(self._learn, level)):
                return False
            level = [value for container in level for value in container.values() if type(value) not in LEAVES]
        return True

    def _learn(self, record: dict[Any, Any]) -> bool:
        if not all(self._is_plain_key(key) for key in record):
            return False
        if len(self._known) + len(record) <= MAX_REMEMBERED:
            self._known.update(record)
        return True

    def _is_plain_key(self, key: Any) -> bool:
        if type(key) is not str or self._delimiter in key:
            return False
        return not self._overlaps or (key != "" and key[0] not in self._delimiter and key[-1] not in self._delimiter)


def read_plain(record: dict[str, Any], path: Sequence[str]) -> Any:
    """The value that a plain record has under this name once it is flattened, or None."""
    value: Any = record
    try:
        for part in path:
            value = value[part]
    except (KeyError, TypeError):
        # TypeError: a leaf where the name expects a dict. In a plain record a leaf takes no text as its index.
        return None
    # A name reaches values, not the dicts that flattening would take apart.
    return None if type(value) is dict and value else value
