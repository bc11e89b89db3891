"""packflow's path for its helpers, so that imports written for packflow need only the other name."""

from streamproc.backend.normalize import ensure_native_types, ensure_valid_output
from streamproc.utils.data import (
    check_delimiter_collisions,
    flatten_dict,
    flatten_records,
    get_nested_field,
    get_nested_field_direct,
    records_to_ndarray,
    set_nested_field_direct,
)

__all__ = [
    "check_delimiter_collisions",
    "ensure_native_types",
    "ensure_valid_output",
    "flatten_dict",
    "flatten_records",
    "get_nested_field",
    "get_nested_field_direct",
    "records_to_ndarray",
    "set_nested_field_direct",
]
