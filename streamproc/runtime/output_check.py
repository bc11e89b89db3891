"""Whether a worker would deliver what a backend answered, for those who run a backend without one.

Invariant: what ``delivered`` returns as bytes is what a worker writes for that record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from streamproc.errors import InferenceBackendValidationError

ONE_DICT_PER_RECORD = 'return one dict per record, for example [{"score": s} for s in scores.tolist()]'


def delivered(outputs: Any, first: int, expected: int, encode: Callable[[Any], bytes] | None = None) -> list[Any]:
    """The outputs for the records from number ``first`` on: JSON, or the ``RecordError`` that stands in its place.

    ``encode`` is that of another format.

    Raises:
        InferenceBackendValidationError: the worker would not deliver them.
    """
    if not isinstance(outputs, list | tuple):
        raise InferenceBackendValidationError(
            f"the outputs must be a list, not {type(outputs).__name__}; {ONE_DICT_PER_RECORD}"
        )
    if len(outputs) != expected:
        raise InferenceBackendValidationError(
            f"a backend must return one output per input, but returned {len(outputs)} for {expected}"
        )
    return [_delivered(output, index, encode) for index, output in enumerate(outputs, first)]


def _delivered(output: Any, index: int, encode: Callable[[Any], bytes] | None) -> Any:
    # Here, since this module is imported before the user's code is, which may set what these read.
    from streamproc.backend.record_error import RecordError  # noqa: PLC0415 - as above
    from streamproc.runtime import codec  # noqa: PLC0415 - as above

    if isinstance(output, RecordError):
        return output
    if not isinstance(output, dict):
        raise InferenceBackendValidationError(
            f"the output at index {index} is not a dict but {type(output).__name__}; {ONE_DICT_PER_RECORD}"
        )
    try:
        return (encode or codec.encode)(output)
    except (TypeError, ValueError, RecursionError) as error:
        written = "written as JSON" if encode is None else "written"
        raise InferenceBackendValidationError(
            f"the output at index {index} cannot be {written}: {error}; see ensure_valid_output()"
        ) from error
