"""``streamproc asyncapi``: the application as an AsyncAPI document, of its settings and declared topics alone."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
import yaml

from streamproc.cli.terminal import ConfigOption, JsonOption, print_json

app = typer.Typer()

_WIDTH = 120


class _Plain(yaml.SafeDumper):
    """Writes what stands in several places in full, since readers of YAML may not know of anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


@app.command(epilog="Example: streamproc asyncapi > asyncapi.yaml")
def asyncapi(*, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Print an AsyncAPI 3 document of the tasks: topics, messages with their schemas, brokers.

    Schemas are those that the declared topics name. It asks no Kafka, loads no backend and holds no secret.
    """
    from streamproc.asyncapi import asyncapi_document  # noqa: PLC0415 - --help needs no pydantic
    from streamproc.broker.declared_topics import load_topics  # noqa: PLC0415 - as above
    from streamproc.settings_loading import load_with_places  # noqa: PLC0415 - as above

    settings = load_with_places(config, os.environ).settings
    document = asyncapi_document(settings, load_topics(settings.topics_dir))
    if as_json:
        print_json(document)
    else:
        yaml.dump(document, sys.stdout, _Plain, sort_keys=False, allow_unicode=True, width=_WIDTH)
