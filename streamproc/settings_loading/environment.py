"""The environment over the file: which setting a variable means, and its text as that setting takes it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

import orjson
from pydantic import BaseModel

from streamproc.errors import SettingsError
from streamproc.settings import TaskSettings
from streamproc.settings_loading.explain import unknown_key
from streamproc.settings_loading.model_walk import (
    PREFIX,
    as_variable,
    inside,
    is_optional,
    model_locs,
    nearest,
    root,
)
from streamproc.settings_loading.source import Source
from streamproc.yaml_lines import MAX_DEPTH

SEED_VARIABLE = "INFERENCE_MAX_BATCH_SIZE"

_NOT_SETTINGS = ("DEBUG", "REQUIRE_KAFKA", "REQUIRE_SENTENCES", "WORKER")
_NOT_SETTINGS_PREFIX = "TEST_"
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT_\d+_(TCP|UDP)(_|$)|^_PORT$")
"""What Kubernetes and Docker inject for a service that is called streamproc, or streamproc-something."""

logger = logging.getLogger(__name__)


def overlay(source: Source, environ: Mapping[str, str]) -> None:
    """Lay the variables over the data: the seed's first, ours over them, the narrower over the wider.

    Raises:
        SettingsError: a variable with our prefix is no setting, or is not JSON where it has to be.
    """
    ours = {name: value for name, value in environ.items() if name.upper().startswith(PREFIX)}
    # Sections before their keys, so that the narrower variable wins. A variable with all the tasks may bring new ones.
    by_depth = sorted(ours, key=lambda name: (name.count("__"), name))
    settings: list[tuple[tuple[str, ...], object, str]] = []
    for name in by_depth:
        _check_text(name, ours[name])
        if name.upper() == f"{PREFIX}TASKS":
            whole = dict[str, TaskSettings]
            source.set(("tasks",), _decoded(whole, ours[name], name, "tasks"), name)
            settings.append((("tasks",), _decoded(whole, ours[name], name, "tasks"), name))  # over the seed's too
        elif _is_a_setting(name, ours[name]):
            loc, annotation = _resolve(name, source)
            settings.append((loc, _decoded(annotation, ours[name], name, ".".join(loc)), name))
    for name, size in _seed_variables(environ):
        for task in _tasks_meant(name, source):
            source.set(("tasks", task, "batch", "max_size"), size, name)
    for loc, value, name in settings:
        source.set(loc, value, name)


def _check_text(name: str, value: str) -> None:
    if name.count("__") > MAX_DEPTH:
        raise SettingsError(
            "is nested too deeply", place=f"environment variable {name}", hint="use JSON, or fewer levels"
        )
    try:
        f"{name}{value}".encode()
    except UnicodeEncodeError:
        raise SettingsError("is not UTF-8", place=f"environment variable {name}", hint="write it in UTF-8") from None


def _seed_variables(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """The seed's variables, the one for every task first."""
    found = [
        (name, value)
        for name, value in environ.items()
        if name.upper() == SEED_VARIABLE or name.upper().startswith(f"{SEED_VARIABLE}_")
    ]
    return sorted(found, key=lambda item: len(item[0]))


def _tasks_meant(name: str, source: Source) -> list[str]:
    tasks = _tasks(source)
    if name.upper() == SEED_VARIABLE:
        return tasks
    wanted = as_variable(name[len(SEED_VARIABLE) + 1 :])
    matching = [task for task in tasks if as_variable(task) == wanted]
    if not matching:
        # Not refused: the name is not ours alone, and one environment may serve several applications.
        logger.warning("environment variable %s names none of the tasks (%s); it is ignored", name, ", ".join(tasks))
    return matching


def _tasks(source: Source) -> list[str]:
    tasks = source.data.get("tasks")
    if not isinstance(tasks, dict):
        return []
    # A task that is no section, or has no name of text, is for validation to complain about.
    return [name for name, task in tasks.items() if isinstance(name, str) and isinstance(task, dict)]


def _is_a_setting(name: str, value: str) -> bool:
    """Whether a variable with our prefix is meant for a setting. Refuses what is nearly one."""
    upper = name.upper()[len(PREFIX) :]
    if upper in _NOT_SETTINGS or upper.startswith(_NOT_SETTINGS_PREFIX):
        return False
    if upper.split("__")[0].lower() in root().model_fields:
        return True
    if "__" not in upper and (_SERVICE_LINK.search(f"_{upper}") or re.match(r"(tcp|udp)://", value)):
        return False
    known = _known_variables()
    folded = {re.sub("_+", "_", variable): variable for variable in known}
    near = folded.get(re.sub("_+", "_", upper)) or nearest(upper, known, cutoff=0.6 if "__" in upper else 0.85)
    if near or "__" in upper:
        raise SettingsError(
            "is no setting",
            place=f"environment variable {name}",
            hint=f"did you mean {PREFIX}{near}?" if near else f"the sections are {', '.join(root().model_fields)}",
        )
    # Such as the images of docker-compose: our prefix, but nothing that could be meant for the file.
    logger.warning("environment variable %s is no setting of streamproc; it is ignored", name)
    return False


def _known_variables() -> list[str]:
    return ["__".join(loc).upper() for loc in model_locs(root()) if "*" not in loc]


def _resolve(name: str, source: Source) -> tuple[tuple[str, ...], Any]:
    """The setting that a variable names, and its type."""
    rest = name[len(PREFIX) :]
    annotation: Any = root()
    loc: tuple[str, ...] = ()
    while rest:
        inner = inside(annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            part, _, rest = rest.partition("__")
            key = part.lower()
            if key not in inner.model_fields:
                raise unknown_key(loc, key, inner, place=f"environment variable {name}", of_a_variable=True)
            loc, annotation = (*loc, key), inner.model_fields[key].annotation
        elif loc == ("tasks",):
            task, rest = _split_task(rest, source, name)
            loc, annotation = (*loc, task), TaskSettings
        elif get_origin(inner) is dict:
            key, _, rest = rest.partition("__")
            loc, annotation = (*loc, _as_in_the_file(key, loc, source)), get_args(inner)[1]
        elif inner is Any:  # deeper into a free section
            key, _, rest = rest.partition("__")
            loc = (*loc, _as_in_the_file(key, loc, source))
        else:
            raise SettingsError(
                f"{'.'.join(loc)} is one value and has nothing below it",
                place=f"environment variable {name}",
                hint=f"set {PREFIX}{'__'.join(as_variable(key) for key in loc)}",
            )
    return loc, annotation


def _split_task(rest: str, source: Source, name: str) -> tuple[str, str]:
    """The task at the beginning of what is left of a variable's name, and what comes after it."""
    tasks = _tasks(source)
    upper = rest.upper()
    # The longest first: a task's own name may contain the delimiter.
    for task in sorted(tasks, key=len, reverse=True):
        wanted = as_variable(task)
        if upper == wanted or upper.startswith(f"{wanted}__"):
            twins = [other for other in tasks if as_variable(other) == wanted]
            if len(twins) > 1:
                raise SettingsError(
                    f"could mean the tasks {' and '.join(twins)}",
                    place=f"environment variable {name}",
                    hint="rename one of them, or set it in the file",
                )
            return task, rest[len(wanted) + 2 :]
    part, _, after = rest.partition("__")
    if not tasks:
        return part.lower(), after
    near = nearest(part.upper(), [as_variable(task) for task in tasks])
    raise SettingsError(
        f"there is no task {part.lower()}",
        place=f"environment variable {name}",
        hint=f"did you mean {PREFIX}TASKS__{near}?" if near else f"the tasks are {', '.join(tasks)}",
    )


def _as_in_the_file(key: str, loc: tuple[str, ...], source: Source) -> str:
    """A free key as the file spells it; else names of variables as they are, and other keys in lower case."""
    try:
        section = source.value(loc)
    except (KeyError, TypeError):
        section = None
    for known in section if isinstance(section, dict) else ():
        if isinstance(known, str) and as_variable(known) == as_variable(key):
            return known
    return key if loc == ("pool", "env") else key.lower()


def _json(text: str) -> object:
    """Strict JSON, nested no deeper than a file may be. Raises ValueError."""
    value: object = json.loads(text) if orjson.loads(text) is not None else None  # the one strict, the other exact
    layer = [value]
    for _ in range(MAX_DEPTH):
        layer = [inner for outer in layer for inner in _inside(outer)]
        if not layer:
            return value
    raise ValueError("nested too deeply")


def _inside(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _decoded(annotation: Any, text: str, variable: str, setting: str) -> object:
    """A variable's text as its setting takes it: JSON for lists and sections, text for all else."""
    inner = inside(annotation)
    section = isinstance(inner, type) and issubclass(inner, BaseModel)
    if text in getattr(inner, "short_forms", ()):
        return text
    if inner is Any:
        try:
            return _json(text)
        except ValueError:
            return text
    if section or get_origin(inner) in {list, dict}:
        try:
            return _json(text)
        except ValueError:
            example = '["a", "b"]' if get_origin(inner) is list else '{"key": "value"}'
            raise SettingsError(
                "expected JSON, which this is not",
                setting=setting,
                place=f"environment variable {variable}",
                hint=f"write it as {example}",
            ) from None
    if is_optional(annotation) and text.lower() in {"", "null", "none"}:
        return None
    return text
