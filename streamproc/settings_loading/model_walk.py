"""The settings' models seen from outside: which settings there are, how they are spelled, which are alike."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from streamproc.settings import Settings

PREFIX = "STREAMPROC_"

Loc = tuple[str | int, ...]


_ROOT: ContextVar[type[Settings]] = ContextVar("the class of the settings that are read", default=Settings)


def root() -> type[Settings]:
    """The class of the settings that are read: ours, or one made of it."""
    return _ROOT.get()


@contextmanager
def rooted(model: type[Settings]) -> Iterator[None]:
    """Within the block, settings are of this class."""
    token = _ROOT.set(model)
    try:
        yield
    finally:
        _ROOT.reset(token)


def inside(annotation: Any) -> Any:
    """A field's type without Annotated and without None."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in {Union, types.UnionType}:
            annotation = next(inner for inner in get_args(annotation) if inner is not type(None))
        else:
            return annotation


def is_optional(annotation: Any) -> bool:
    """Whether a field takes None."""
    return get_origin(annotation) in {Union, types.UnionType} and type(None) in get_args(annotation)


def model_at(section: Loc) -> type[BaseModel] | None:
    """The model of a section."""
    annotation: Any = root()
    for key in section:
        inner = inside(annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            known = inner.model_fields.get(str(key))
            if known is None:
                return None
            annotation = known.annotation
        elif get_origin(inner) is dict:
            annotation = get_args(inner)[1]
        else:
            return None
    inner = inside(annotation)
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def model_locs(model: type[BaseModel], loc: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every setting there is; ``*`` stands for the name of a task."""
    for name, known in model.model_fields.items():
        here = (*loc, name)
        yield here
        inner = inside(known.annotation)
        if get_origin(inner) is dict:
            inner, here = inside(get_args(inner)[1]), (*here, "*")
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from model_locs(inner, here)


def as_variable(name: str) -> str:
    """A key as the environment spells it."""
    return re.sub(r"[-.]", "_", name).upper()


def dotted(loc: Loc) -> str:
    """A setting's name for people."""
    return ".".join(str(part) for part in loc)


def either(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def nearest(word: str, known: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The known word that is most like this one, if any is."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=cutoff)), None)
