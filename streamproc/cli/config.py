"""``streamproc config``: the settings as they take effect, and their JSON Schema."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import typer

from streamproc.cli.terminal import ConfigOption, JsonOption, print_json, stdout

app = typer.Typer(no_args_is_help=True)

HIDDEN = "********"
_SECRET = re.compile(r"pass(word|wd|phrase)?|secret|token|credential|api_?key|private_?key|access_?key", re.IGNORECASE)
_COLUMN = 60
_WIDE = 100


@app.callback(epilog="Example: streamproc config show")
def config_() -> None:
    """Show the effective settings, or their JSON Schema."""


@app.command(epilog="Example: streamproc config schema > streamproc.schema.json")
def schema() -> None:
    """Print the JSON Schema of streamproc.yaml, for editors.

    Put `# yaml-language-server: $schema=streamproc.schema.json` into the first line of streamproc.yaml.
    """
    from streamproc.settings_loading import json_schema  # noqa: PLC0415 - --help needs no pydantic

    print_json(json_schema())


@app.command(epilog="Example: streamproc config show -c streamproc.yaml")
def show(*, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Print every setting as it takes effect, with its place: a line of the file, an environment variable, the default.

    Secrets are hidden: passwords, and what looks like one in backend.config and pool.env.
    """
    from streamproc.settings_loading import load_with_places  # noqa: PLC0415 - as above

    loaded = load_with_places(config, os.environ)
    settings = loaded.settings.model_dump(mode="json")
    for name in settings["tasks"]:
        topics = loaded.settings.topics_of(name)
        task = settings["tasks"][name]
        task["output"]["topic"], task["metrics"]["topic"], task["dead_letters"]["topic"] = (
            topics.results,
            topics.metrics,
            topics.dead,
        )
    shown = _without_secrets(settings)
    if as_json:
        places = {".".join(map(str, loc)): loaded.place_of(loc) for loc, _ in _leaves(shown)}
        print_json({"settings": shown, "places": places})
    else:
        sys.stdout.writelines(f"{line}\n" for line in _yaml(shown, loaded.place_of, stdout.width))


def _without_secrets(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _without_secrets(inner, str(name)) for name, inner in value.items()}
    hidden = value is not None and _SECRET.search(key) and not key.endswith("_file")
    return HIDDEN if hidden else value


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
        name = key if re.fullmatch(r"[A-Za-z_][\w.-]*", key) else orjson.dumps(key).decode()
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _yaml(value, place_of, width, (*loc, key))
        else:
            # JSON is YAML too, and leaves no doubt about what is text.
            written = f"{indent}{name}: {orjson.dumps(value).decode()}"
            place = f"# {place_of((*loc, key))}"
            beside = f"{written:<{_COLUMN if width >= _WIDE else 0}} {place}"
            yield from [beside] if len(beside) <= width else [f"{indent}{place}", written]
