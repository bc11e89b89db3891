"""Two JSON values against each other, field by field: equal, close within a tolerance, or changed. Pure functions.

A path is written ``a.b[0].c``, with ``["odd.key"]`` where a key is no plain name, and ``$`` for the value as a whole.
In a pattern ``[*]`` is any place in a list, and ``*`` any key; a pattern speaks for what is below it too.

What is compared:

- Numbers by their values: 1 equals 1.0, NaN equals NaN. ``true`` is no number.
- Floats within a tolerance are close. Two integers are not, unless the field has a tolerance of its own: they count
  things, or name them.
- The order of a list matters, that of keys does not. A null is not the same as no key.

Invariant: exchanging the two values exchanges both sides of every change, and nothing else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Step = str | int
Path = tuple[Step, ...]

ANY = object()
"""A step of a pattern that stands for any place, or any key."""

ROOT = "$"
VECTOR_LENGTH = 16
"""Lists of floats from this length are compared as arrays: in a twentieth of the time."""

_PLAIN = re.compile(r"[^\s.\[\]\"*$=]+")
_STEP = re.compile(r'\[(?P<any>\*)\]|\[(?P<place>\d+)\]|\[(?P<quoted>"(?:[^"\\]|\\.)*")\]|\.?(?P<name>[^.\[\]"]+)')


class Absent:
    """Stands for what one of the two values does not have."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = Absent()


class Tolerance(NamedTuple):
    """How far apart two numbers may be and still be close: the larger of the two bounds counts."""

    absolute: float = 0.0
    relative: float = 0.0

    def covers(self, first: float, second: float) -> bool:
        """Whether the numbers are close; the same whichever comes first."""
        bound = max(self.absolute, self.relative * max(abs(first), abs(second)))
        return math.isfinite(bound) and abs(first - second) <= bound

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """``0.01``, or ``1%`` of the larger number. Raises ValueError."""
        number = number_of(text.removesuffix("%"))
        if number is None:
            raise ValueError(f"{text!r} is no tolerance: write a number such as 0.01, or a share such as 1%")
        return cls(relative=number / 100) if text.endswith("%") else cls(absolute=number)


def number_of(text: str) -> float | None:
    """A finite number of at least 0; None where the text is something else."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None


BATCHING = Tolerance(absolute=1e-9, relative=1e-6)
"""What 32-bit arithmetic makes of the same record in batches of different sizes."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which fields something is said of."""

    text: str
    steps: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """A pattern such as ``scores[*].value``. Raises ValueError."""
        steps: list[Any] = []
        at = len(ROOT) if text.startswith(ROOT) else 0
        while at < len(text):
            found = _STEP.match(text, at)
            # A name stands at the beginning, or behind a dot.
            if found is None or (found["name"] is not None and (text[at] == ".") != bool(steps or text[0] == ROOT)):
                raise ValueError(f'{text!r} is no field: write it like score, a.b, scores[*].value or ["odd.key"]')
            steps.append(_step(found))
            at = found.end()
        if not text:
            raise ValueError("a field has no name")
        return cls(text, tuple(steps))

    def covers(self, path: Path) -> bool:
        """Whether it speaks for a path: its own, and those below."""
        return len(self.steps) <= len(path) and all(
            wanted is ANY or wanted == step for wanted, step in zip(self.steps, path, strict=False)
        )


def _step(found: re.Match[str]) -> Any:
    if found["any"] or found["name"] == "*":
        return ANY
    if found["place"]:
        return int(found["place"])
    return json.loads(found["quoted"]) if found["quoted"] else found["name"]


@dataclass(frozen=True, slots=True)
class Rules:
    """How values are compared: a tolerance for all floats, others by field, and fields that are passed over."""

    tolerance: Tolerance = BATCHING
    fields: Mapping[Pattern, Tolerance] = field(default_factory=dict)
    ignored: Sequence[Pattern] = ()

    def of(self, path: Path) -> Tolerance | None:
        """The tolerance that a field has of its own: that of the longest pattern, of equally long ones the last."""
        own = [(len(it.steps), number) for number, it in enumerate(self.fields) if it.covers(path)]
        return list(self.fields.values())[max(own)[1]] if own else None

    def ignores(self, path: Path) -> bool:
        """Whether a field is passed over."""
        return any(it.covers(path) for it in self.ignored)

    @property
    def by_place(self) -> bool:
        """Whether something is said of single places in lists."""
        patterns = [*self.fields, *self.ignored]
        return any(isinstance(step, int) for it in patterns for step in it.steps)


@dataclass(slots=True)
class Change:
    """What differs in one field; in a list, of all the fields that differ by their place alone.

    ``baseline`` and ``candidate`` are those at ``worst``. ``size`` is the largest absolute difference, None where none
    of them is one of numbers; ``sizes`` is the sum over the ``numbers`` of them that are.
    """

    path: str
    worst: str
    baseline: Any
    candidate: Any
    is_close: bool
    size: float | None = None
    sizes: float = 0.0
    numbers: int = 0

    def add(self, other: Change) -> None:
        """Take in another one of the same path; the worse of the two is shown."""
        if (other.is_close, -_rank(other)) < (self.is_close, -_rank(self)):
            self.worst, self.baseline, self.candidate = other.worst, other.baseline, other.candidate
        self.is_close = self.is_close and other.is_close
        known = [it for it in (self.size, other.size) if it is not None]
        self.size = max(known, default=None)
        self.sizes += other.sizes
        self.numbers += other.numbers


def _rank(change: Change) -> float:
    """What is no difference of numbers is worse than any that is."""
    return math.inf if change.size is None else change.size


def compare(baseline: Any, candidate: Any, rules: Rules) -> list[Change]:
    """What differs, by path with ``[*]`` for places; nothing where the values are equal."""
    changes: dict[str, Change] = {}
    vectors = not rules.by_place
    waiting: list[tuple[Any, Any, Path]] = [(baseline, candidate, ())]
    while waiting:  # no recursion: JSON may be nested more deeply than Python's stack
        first, second, path = waiting.pop()
        kinds = (type(first), type(second))
        if kinds == (dict, dict):
            keys = [*first, *(key for key in second if key not in first)]
            waiting += [(first.get(it, ABSENT), second.get(it, ABSENT), (*path, it)) for it in reversed(keys)]
        elif kinds == (list, list):
            same_length = len(first) == len(second)
            if vectors and same_length and _are_vectors(first, second):
                _add(changes, _vectors(first, second, path, rules))
                continue
            if not same_length:
                _add(changes, _changed(first, second, path, rules))
            pairs = [(a, b, (*path, place)) for place, (a, b) in enumerate(zip(first, second, strict=False))]
            waiting += reversed(pairs)
        elif first is not second:
            _add(changes, _leaf(first, second, path, rules))
    return list(changes.values())


def _add(changes: dict[str, Change], change: Change | None) -> None:
    if change is None:
        return
    if change.path in changes:
        changes[change.path].add(change)
    else:
        changes[change.path] = change


def _leaf(first: Any, second: Any, path: Path, rules: Rules) -> Change | None:
    """Two values that are not both objects, nor both lists."""
    numbers = (int, float)
    if type(first) in numbers and type(second) in numbers:
        if first == second or (first != first and second != second):  # noqa: PLR0124 - so is NaN, and nothing else
            return None
        return _numbers(first, second, path, rules)
    if type(first) is type(second) and first == second:
        return None
    return _changed(first, second, path, rules)


def _changed(first: Any, second: Any, path: Path, rules: Rules) -> Change | None:
    return None if rules.ignores(path) else Change(generic(path), text_of(path), first, second, is_close=False)


def _numbers(first: float, second: float, path: Path, rules: Rules) -> Change | None:
    if rules.ignores(path):
        return None
    own = rules.of(path)
    tolerance = own or (Tolerance() if type(first) is type(second) is int else rules.tolerance)
    size = abs(first - second)
    change = Change(generic(path), text_of(path), first, second, tolerance.covers(first, second))
    if math.isfinite(size):
        change.size, change.sizes, change.numbers = float(size), float(size), 1
    return change


def _are_vectors(first: list[Any], second: list[Any]) -> bool:
    return len(first) >= VECTOR_LENGTH and {*map(type, first), *map(type, second)} == {float}


def _vectors(first: list[float], second: list[float], path: Path, rules: Rules) -> Change | None:
    """Two lists of as many floats, as ``_numbers`` would find for each pair."""
    a, b = np.array(first), np.array(second)
    differs = (a != b) & ~(np.isnan(a) & np.isnan(b))
    at = (*path, 0)
    if not differs.any() or rules.ignores(at):
        return None
    tolerance = rules.of(at) or rules.tolerance
    with np.errstate(all="ignore"):  # infinities and NaN have no difference, and are found below
        sizes = np.abs(a - b)
        bound = np.maximum(tolerance.absolute, tolerance.relative * np.maximum(np.abs(a), np.abs(b)))
        outside = differs & ~(np.isfinite(bound) & (sizes <= bound))
    finite = differs & np.isfinite(sizes)
    candidates = outside if outside.any() else differs
    worst = int(np.argmax(np.where(candidates, np.where(np.isfinite(sizes), sizes, np.inf), -1.0)))
    change = Change(generic(at), text_of((*path, worst)), first[worst], second[worst], not outside.any())
    if finite.any():
        change.size, change.sizes, change.numbers = (
            float(sizes[finite].max()),
            float(sizes[finite].sum()),
            int(finite.sum()),
        )
    return change


def text_of(path: Path) -> str:
    """A path for people, as ``Pattern`` reads it."""
    return _join([f"[{step}]" if isinstance(step, int) else step for step in path], path)


def generic(path: Path) -> str:
    """A path without its places: ``scores[*].value``."""
    return _join(["[*]" if isinstance(step, int) else step for step in path], path)


def _join(texts: Sequence[str], path: Path) -> str:
    parts: list[str] = []
    for text, step in zip(texts, path, strict=True):
        if isinstance(step, int):
            parts.append(text)
        elif _PLAIN.fullmatch(text) and text.isprintable():
            parts.append(f".{text}" if parts else text)
        else:
            parts.append(f"[{json.dumps(text, ensure_ascii=not text.isprintable())}]")
    return "".join(parts) or ROOT
