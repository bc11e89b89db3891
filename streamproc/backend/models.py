"""What a backend says of its records: pydantic models of its inputs and outputs, as JSON Schemas for the documentation.

They describe and check nothing: what comes is checked by its topic's schema, before the backend sees it. So what cannot
be shown is told in the log, and costs nobody anything.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import orjson
from pydantic import BaseModel

from streamproc.errors import name_of_type, text_of

MAX_SCHEMA_BYTES = 1_048_576

log = logging.getLogger(__name__)


def declared_schemas(task: object) -> dict[str, orjson.Fragment]:
    """The JSON Schemas, as JSON, of what a backend or a task names as ``input_model`` and ``output_model``.

    Those of its class: a backend of packflow's may have something else of that name in itself, such as its weights.
    """
    found: dict[str, orjson.Fragment] = {}
    for role in ("input", "output"):
        schema = _schema_of(type(task), f"{role}_model", "validation" if role == "input" else "serialization")
        if schema is not None:
            found[role] = orjson.Fragment(schema)
    return found


def _schema_of(owner: type, name: str, mode: Literal["validation", "serialization"]) -> bytes | None:
    model: Any = getattr(owner, name, None)
    if model is None:
        return None
    schema = b""
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        why = "it is no class derived from pydantic.BaseModel"
    else:
        try:
            schema = orjson.dumps(model.model_json_schema(mode=mode))
            why = f"its JSON Schema has more than {MAX_SCHEMA_BYTES:,} bytes"
        except Exception as error:  # noqa: BLE001 - of the user's model, whose fields say how they are described
            why = f"{name_of_type(error)}: {text_of(error)}"
    if 0 < len(schema) <= MAX_SCHEMA_BYTES:
        return schema
    log.warning("%s of %s is not in the documentation: %s", name, owner.__name__, why)
    return None
