"""``streamproc config``: the settings as they take effect, and their JSON Schema."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import typer

from streamproc.cli.terminal import ConfigOption, JsonOption, print_json, stdout
from streamproc.errors import SECRET_IN_TEXT, printable

if TYPE_CHECKING:
    from streamproc.settings import Settings

app = typer.Typer(no_args_is_help=True)

HIDDEN = "********"
_SECRET = re.compile(
    r"pass(word|wd|phrase)?|secret|token(?!i[sz]e|s$)|credential|api_?key|private_?key|access_?key", re.IGNORECASE
)
_PLAIN_KEY = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)$)[A-Za-z_][A-Za-z0-9_.-]*", re.IGNORECASE)
_COLUMN = 60
_WIDE = 100


@app.callback(epilog="Example: streamproc config show")
def config_() -> None:
    """Show the effective settings, or their JSON Schema."""


@app.command(epilog="Example: streamproc config schema > streamproc.schema.json")
def schema(*, config: ConfigOption = None) -> None:
    """Print the JSON Schema of streamproc.yaml, for editors; with the fields of its settings_class where -c names it.

    Put `# yaml-language-server: $schema=streamproc.schema.json` into the first line of streamproc.yaml.
    """
    from streamproc.settings_loading import json_schema  # noqa: PLC0415 - --help needs no pydantic

    print_json(json_schema(config, os.environ))


@app.command(epilog="Example: streamproc config show -c streamproc.yaml")
def show(*, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Print every setting as it takes effect, with its place: a line of the file, an environment variable, the default.

    Secrets are hidden: passwords, and what looks like one in backend.config and pool.env.
    """
    from streamproc.settings_loading import load_with_places  # noqa: PLC0415 - as above

    loaded = load_with_places(config, os.environ)
    shown = shown_settings(loaded.settings)
    if as_json:
        places = {".".join(map(str, loc)): printable(loaded.place_of(loc)) for loc, _ in _leaves(shown)}
        print_json({"settings": shown, "places": places})
    else:
        sys.stdout.writelines(f"{line}\n" for line in _yaml(shown, loaded.place_of, stdout.width))


def shown_settings(settings: Settings) -> dict[str, Any]:
    """The settings as plain data, with the topics that are left to their defaults, and without secrets."""
    plain: dict[str, Any] = settings.model_dump(mode="json")
    for name, task in plain["tasks"].items():
        topics = settings.topics_of(name)
        task["output"]["topic"], task["metrics"]["topic"], task["dead_letters"]["topic"] = (
            topics.results,
            topics.metrics,
            topics.dead,
        )
    return cast("dict[str, Any]", _without_secrets(plain))


def _without_secrets(value: Any, *, hidden: bool = False) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_secrets(inner, hidden=hidden or (bool(_SECRET.search(name)) and not name.endswith("_file")))
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_without_secrets(inner, hidden=hidden) for inner in value]
    hidden = hidden or (isinstance(value, str) and SECRET_IN_TEXT.search(value) is not None)
    return HIDDEN if hidden and value is not None else value


def _leaves(value: Any, loc: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*loc, str(key)))
    else:
        yield loc, value


def _yaml(
    section: dict[str, Any], place_of: Callable[[tuple[str | int, ...]], str], width: int, loc: tuple[str, ...] = ()
) -> Iterator[str]:
    """The settings as YAML, each value's place in a comment beside it, or above it where the line is too narrow."""
    indent = "  " * len(loc)
    for key, value in section.items():
        name = key if _PLAIN_KEY.fullmatch(key) else _flow(key)
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _yaml(value, place_of, width, (*loc, key))
        else:
            written = f"{indent}{name}: {_flow(value)}"
            place = f"# {printable(place_of((*loc, key)))}"
            beside = f"{written:<{_COLUMN if width >= _WIDE else 0}} {place}"
            yield from [beside] if len(beside) <= width else [f"{indent}{place}", written]


def _flow(value: Any) -> str:
    """A value as JSON, which is YAML too and leaves no doubt about what is text, and YAML where JSON has no word."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, float):
        if not math.isfinite(value):
            return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")  # without a point PyYAML takes 1e+300 for text
    text = json.dumps(value, ensure_ascii=False)
    return "".join([it if it.isprintable() else f"\\U{ord(it):08x}" for it in text])
