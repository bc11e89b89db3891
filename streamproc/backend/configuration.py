"""A backend's configuration: its fields, and where their values come from.

Values come from the keyword arguments, then from the file that ``BACKEND_CONFIG_FILE_PATH`` names, which wins.
Invariant: a problem with that file never stops a backend. It is logged, and the keyword arguments stand alone,
because the file is put there by a deployment and the backend has to run outside of one too.
"""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from streamproc.logger import get_logger

CONFIG_FILE_VARIABLE = "BACKEND_CONFIG_FILE_PATH"

_logger = get_logger()


class InputFormats(enum.Enum):
    """What ``transform_inputs`` or ``execute`` is given."""

    PASSTHROUGH = "passthrough"
    RECORDS = "records"
    NUMPY = "numpy"


class BackendConfig(BaseModel):
    """The fields every backend has. A subclass adds its own, with or without defaults.

    Attributes:
        verbose: Log the metrics of every call.
        input_format: Which preprocessor runs before the backend's own steps.
        rename_fields: Old name to new name.
        feature_names: The fields to keep, in this order; empty keeps all.
        flatten_nested_inputs: Turn ``{"a": {"b": 1}}`` into ``{"a.b": 1}``.
        flatten_lists: With ``flatten_nested_inputs``, turn ``{"a": [5]}`` into ``{"a.0": 5}``.
        nested_field_delimiter: What stands between the parts of a nested field's name.
        ignore_delimiter_collisions: Accept input keys that have the delimiter in them.
        output_keys: The fields that outputs are meant to have; ``check_io`` warns about those it does not find.
    """

    verbose: bool = False
    input_format: InputFormats = InputFormats.RECORDS
    # Not dict[str, str]: packflow accepts any dict here and fails, if at all, on the first batch.
    rename_fields: dict[Any, Any] = {}
    feature_names: list[str] = []
    flatten_nested_inputs: bool = False
    flatten_lists: bool = False
    nested_field_delimiter: str = "."
    ignore_delimiter_collisions: bool = False
    output_keys: list[str] = []


def load_backend_configuration(
    backend_config_model: BackendConfig | type[BackendConfig] = BackendConfig, **backend_kwargs: Any
) -> BackendConfig:
    """Merge the configuration file over the keyword arguments and validate the result.

    Args:
        backend_config_model: The model to validate with.
        **backend_kwargs: The configuration as the caller gives it.

    Raises:
        pydantic.ValidationError: A value does not fit the model.
    """
    return validate_configuration(backend_config_model, with_file_overrides(backend_kwargs))


def validate_configuration(
    backend_config_model: BackendConfig | type[BackendConfig], values: Mapping[str, Any]
) -> BackendConfig:
    """Validate values that are already merged."""
    # Names alone: a value may be a password to the backend's own services.
    _logger.debug("Configuration: %s given, the rest by default", ", ".join(map(str, values)) or "nothing")
    return backend_config_model.model_validate(dict(values))


def with_file_overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with the ``configs`` of the file named by ``BACKEND_CONFIG_FILE_PATH`` merged over them."""
    path = os.environ.get(CONFIG_FILE_VARIABLE)
    return deep_merge(values, _read_configs(Path(path))) if path else dict(values)


def deep_merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """A new dict: dicts merge key by key, anything else, lists too, is replaced."""
    merged = dict(base)
    for key, value in override.items():
        known = merged.get(key)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            merged[key] = deep_merge(known, value)
        else:
            merged[key] = value
    return merged


def _read_configs(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        # The message says it all; a traceback into json would not help whoever wrote the file.
        _logger.error("%s: %s cannot be read and is ignored: %s", CONFIG_FILE_VARIABLE, path, error)  # noqa: TRY400
        return {}
    configs = content.get("configs") if isinstance(content, dict) else None
    if not isinstance(configs, dict):
        _logger.warning("%s: %s has no object under a top key 'configs', and is ignored", CONFIG_FILE_VARIABLE, path)
        return {}
    return configs
