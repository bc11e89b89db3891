"""From ``streamproc.yaml`` and the environment to ``Settings``, or to one sentence that says what to mend and where.

Precedence, the later over the earlier: the defaults, the file, ``INFERENCE_MAX_BATCH_SIZE``,
``INFERENCE_MAX_BATCH_SIZE_<TASK>``, ``STREAMPROC_SECTION__KEY``. The variables follow pydantic-settings' conventions:
``__`` goes one level down, case does not matter, lists and sections are JSON. The walk is our own because that library
names no variable in its errors, lowers the case of free keys (``pool.env``), keeps the values of free sections
(``backend.config``) as text, and ignores unknown variables.

Invariants:

- Every value knows its place: ``file:line``, or the environment variable that set it.
- No message repeats a secret: values of secret fields, of ``backend.config`` and of ``pool.env`` are never quoted.
- A ``STREAMPROC_`` variable that could be meant for a setting and is not one is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from streamproc.errors import SettingsError
from streamproc.settings import BASE_DIR, KafkaSettings, Settings
from streamproc.settings_loading.environment import overlay
from streamproc.settings_loading.explain import explained
from streamproc.settings_loading.model_walk import PREFIX, Loc, dotted, rooted
from streamproc.settings_loading.own_class import own_class
from streamproc.settings_loading.source import Source

DEFAULT_PATH = Path("streamproc.yaml")

_ADDRESS = re.compile(r"(?:\[[^\]\s]+\]|[^:\s\[\]]+):(\d{1,5})")
_FILES: tuple[Loc, ...] = (
    *(("kafka", name) for name in ("sasl_password_file", "ssl_ca_file", "ssl_cert_file", "ssl_key_file")),
    *(
        ("schema_registry", name)
        for name in ("password_file", "token_file", "ssl_ca_file", "ssl_cert_file", "ssl_key_file")
    ),
    ("http", "token_file"),
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and where each of them was set."""

    settings: Settings
    place_of: Callable[[Loc], str]
    """The place of a setting: `file:line`, an environment variable, or `default`."""


def load_settings(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """Read the settings file (``streamproc.yaml`` by default) and lay the environment over it.

    Raises:
        SettingsError: they cannot be used; one sentence with the place, the setting and what to do.
    """
    return load_with_places(path, environ).settings


def load_with_places(path: Path | None, environ: Mapping[str, str]) -> Loaded:
    """As ``load_settings``, keeping the place of every value."""
    source = Source.read(path or DEFAULT_PATH)
    model = own_class(source, environ)
    with rooted(model):
        overlay(source, environ)
        try:
            settings = model.model_validate(source.data, context={BASE_DIR: source.path.absolute().parent})
        except ValidationError as error:
            raise explained(error.errors(include_url=False), source) from None
    _check_addresses(settings.kafka, source)
    _check_files(settings, source)
    return Loaded(settings, source.place_of)


def load_kafka_settings(environ: Mapping[str, str]) -> KafkaSettings:
    """How to reach Kafka by the environment alone, for commands that need nothing else of a settings file.

    Raises:
        SettingsError: a variable cannot be used.
    """
    source = Source(Path(), {}, lambda _: "environment")
    overlay(source, {name: value for name, value in environ.items() if name.upper().startswith(f"{PREFIX}KAFKA__")})
    try:
        kafka = KafkaSettings.model_validate(source.data.get("kafka", {}))
    except ValidationError as error:
        # The section's locations as those of the whole.
        errors = [{**found, "loc": ("kafka", *found["loc"])} for found in error.errors(include_url=False)]
        raise explained(cast("list[ErrorDetails]", errors), source) from None
    _check_addresses(kafka, source)
    return kafka


def json_schema(path: Path | None = None, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON Schema of ``streamproc.yaml``, for editors; with the fields of a given file's ``settings_class``.

    Raises:
        SettingsError: the file cannot be read, or its class cannot be found.
    """
    model = Settings if path is None else own_class(Source.read(path), environ or {})
    schema = model.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "streamproc.yaml",
        "description": "The settings of a streamproc processor.",
    }


def check_bootstrap_servers(text: str, place: str) -> None:
    """Refuse what is no list of addresses: Kafka's clients would take a port of their own, and wait there.

    Raises:
        SettingsError: an address has no host or no port.
    """
    for address in text.split(","):
        found = _ADDRESS.fullmatch(address.strip())
        if found is None or not 0 < int(found[1]) <= 65_535:
            raise SettingsError(
                f"{address.strip()!r} is no address of the form host:port",
                setting="kafka.bootstrap_servers",
                place=place,
                hint="write it like localhost:9092, several separated by commas",
            )


def _check_addresses(kafka: KafkaSettings, source: Source) -> None:
    check_bootstrap_servers(kafka.bootstrap_servers, source.place(("kafka", "bootstrap_servers")))


def _check_files(settings: Settings, source: Source) -> None:
    """Files that the settings name must be there; saying so now beats an obscure failure at the first connection."""
    for loc in _FILES:
        path: Path | None = getattr(getattr(settings, str(loc[0])), str(loc[1]))
        if path is not None and not os.path.isfile(path):  # noqa: PTH113 - Path's own raises for names too long
            raise SettingsError(
                f"there is no file {path}",
                setting=dotted(loc),
                place=source.place(loc),
                hint="relative paths start from the settings file's folder",
            )
    topics_dir: Loc = ("topics_dir",)
    if source.known_part(topics_dir) == topics_dir and not os.path.isdir(settings.topics_dir):  # noqa: PTH112 - as above
        raise SettingsError(
            f"there is no folder {settings.topics_dir}",
            setting="topics_dir",
            place=source.place(topics_dir),
            hint="create it, or leave the setting out",
        )
