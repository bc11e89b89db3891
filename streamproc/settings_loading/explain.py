"""What pydantic found, as one sentence for the person who wrote the settings. Quotes no value that may be secret."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel, SecretStr
from pydantic_core import ErrorDetails

from streamproc.errors import SettingsError
from streamproc.settings import CrossFieldError
from streamproc.settings_loading.model_walk import (
    PREFIX,
    Loc,
    as_variable,
    dotted,
    either,
    inside,
    model_at,
    model_locs,
    nearest,
    root,
)

_UNQUOTED = (("backend", "config"), ("pool", "env"))
_NAMED_AT_MOST = 5


class Places(Protocol):
    """Where settings were set."""

    def known_part(self, loc: Loc) -> Loc:
        """The longest beginning of ``loc`` that was set somewhere."""

    def place(self, loc: Loc) -> str:
        """The place of a setting, or of the nearest section around it that was set."""


def explained(errors: Sequence[ErrorDetails], places: Places) -> SettingsError:
    """The first error as a sentence; the others named, so that a file is mended in one go."""
    every = [_explain(error, places) for error in errors]
    first = every[0]
    if len(every) == 1:
        return first
    others = [
        f"{other.setting} ({', '.join(filter(None, (other.place, other.hint)))})"
        for other in every[1 : _NAMED_AT_MOST + 1]
    ]
    if len(every) - 1 > _NAMED_AT_MOST:
        others.append(f"{len(every) - 1 - _NAMED_AT_MOST} more")
    also = f"also wrong: {', '.join(others)}"
    hint = f"{first.hint}; {also}" if first.hint else also
    return SettingsError(first.problem, setting=first.setting, place=first.place, hint=hint)


def _explain(error: ErrorDetails, places: Places) -> SettingsError:
    raised = error.get("ctx", {}).get("error")
    if isinstance(raised, CrossFieldError):
        keys = [(*error["loc"], *key) for key in raised.keys]
        set_somewhere = next((key for key in keys if places.known_part(key) == key), keys[0])
        return SettingsError(
            raised.problem, setting=dotted(keys[0]), place=places.place(set_somewhere), hint=raised.hint
        )
    kind, loc = error["type"], error["loc"]
    if loc and loc[-1] == "[key]":
        loc = loc[:-1]
    place = places.place(loc)
    if kind == "extra_forbidden":
        *section, key = loc
        model = model_at(tuple(section))
        return unknown_key(tuple(section), str(key), model, place=place)
    if kind == "missing":
        return SettingsError("is missing", setting=dotted(loc), place=place, hint="add it")
    problem, hint = _sentence(error, loc)
    return SettingsError(problem, setting=dotted(loc), place=place, hint=hint)


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "a section of keys and values",
    "model": "a section of keys and values",
    "path": "a path",
}


def _sentence(error: ErrorDetails, loc: Loc) -> tuple[str, str]:
    """What was wrong with a value, and what to do."""
    kind, context = error["type"], error.get("ctx", {})
    got = _got(error["input"], loc)
    limits = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("more than", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("less than", "lt"),
    }
    if kind in limits:
        words, limit = limits[kind]
        return f"expected {words} {context[limit]:.15g}, got {got}", "change it"
    if kind == "literal_error":
        allowed = [choice.strip("'") for choice in re.findall(r"'[^']*'", str(context["expected"]))]
        near = nearest(str(error["input"]), allowed)
        return f"expected {either(allowed)}, got {got}", f"did you mean {near}?" if near else "choose one of these"
    fixed = {
        "string_pattern_mismatch": (f"{got} is no name", "use letters, digits, dots, underscores and hyphens"),
        "string_too_long": (f"is longer than {context.get('max_length')} characters", "shorten it"),
        "too_short": ("is empty", f"give at least {context.get('min_length')}"),
    }
    if kind in fixed:
        return fixed[kind]
    expected = _EXPECTED.get(kind.split("_")[0])
    if expected is None:
        return error["msg"][:1].lower() + error["msg"][1:], "change it"
    if kind.startswith(("model", "dict")):
        got = kind_of(error["input"])  # what stands in place of a section may be anything of what belongs into it
    return f"expected {expected}, got {got}", _hint_for_type(expected, error["input"])


def _hint_for_type(expected: str, value: object) -> str:
    if expected == "text" and isinstance(value, int | float):
        return "put it in quotes"
    if expected == "a list" and isinstance(value, str):
        return "put it in brackets: [a, b]"
    if value is None:
        return "fill it, or leave the key out"
    return "change it"


def _got(value: object, loc: Loc) -> str:
    """A value for a message: what kind of thing it is, and the value itself where it can be no secret."""
    kind = kind_of(value)
    hidden = any(loc[: len(free)] == free for free in _UNQUOTED) or _is_secret(loc)
    if isinstance(value, str | int | float) and not hidden and len(str(value)) <= 40:
        return f"'{value}'" if isinstance(value, str) else json.dumps(value)
    return kind


def kind_of(value: object) -> str:
    """What kind of thing a value from the file is, in words."""
    kinds = (
        (bool, "true or false"),
        (int, "a number"),
        (float, "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "a section of keys and values"),
    )
    return next((words for kind, words in kinds if isinstance(value, kind)), "nothing" if value is None else "a date")


def _is_secret(loc: Loc) -> bool:
    model = model_at(loc[:-1]) if loc else None
    known = model.model_fields.get(str(loc[-1])) if model else None
    return known is not None and inside(known.annotation) is SecretStr


def unknown_key(
    section: Loc, key: str, model: type[BaseModel] | None, *, place: str, of_a_variable: bool = False
) -> SettingsError:
    """An unknown key: the nearest name beside it, else where the same name is known, else all names beside it."""

    def spelled(loc: Loc) -> str:
        return PREFIX + "__".join(as_variable(str(part)) for part in loc) if of_a_variable else dotted(loc)

    word = re.split(r"[\s:=]", key, maxsplit=1)[0]
    if word != key:
        key = f"{word}…"  # a colon or a quote is missing, and what follows may be a value, and secret
    beside = list(model.model_fields) if model else []
    near = nearest(key, beside)
    if near:
        hint = f"did you mean {spelled((*section, near)) if of_a_variable else near}?"
    else:
        task = section[1] if len(section) > 1 and section[0] == "tasks" else "<task>"
        elsewhere = [tuple(task if part == "*" else part for part in loc) for loc in model_locs(root())]
        same = [loc for loc in elsewhere if loc[-1] == key]
        # One in the section itself, then one anywhere.
        same.sort(key=lambda loc: loc[: len(section)] != tuple(section))
        hint = f"did you mean {spelled(same[0])}?" if same else f"known here: {', '.join(beside)}"
    return SettingsError("is no setting", setting=dotted((*section, key)), place=place, hint=hint)
