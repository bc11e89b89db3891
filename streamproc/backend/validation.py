"""The checks that a backend has to pass before a stream depends on it.

Invariant: each failure names the index of the record at fault, and says whether the backend failed
(``InferenceBackendRuntimeError``) or answered in the wrong shape (``InferenceBackendValidationError``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from streamproc.backend.configuration import BackendConfig
from streamproc.backend.record_error import RecordError
from streamproc.errors import InferenceBackendRuntimeError, InferenceBackendValidationError
from streamproc.logger import BackendLogger


class Checkable(Protocol):
    """What ``check_io`` needs of a backend."""

    config: BackendConfig
    logger: BackendLogger

    def __call__(self, inputs: list[dict[str, Any]], /) -> Any:
        """Run a batch."""


def check_io(backend: Checkable, inputs: dict[str, Any] | list[dict[str, Any]]) -> Any:
    """Run sample records through the backend and check what goes in and what comes out.

    An output that is a ``RecordError`` is a record failed on purpose, and passes.

    Returns:
        The outputs, or the one output if ``inputs`` is a dict.

    Raises:
        InferenceBackendValidationError: Inputs or outputs do not have the shape that a stream needs.
        InferenceBackendRuntimeError: The backend itself failed.
    """
    records = [inputs] if isinstance(inputs, dict) else inputs
    _check_inputs(records)
    try:
        outputs = backend(records)
    except Exception as error:
        raise InferenceBackendRuntimeError(f"the backend failed on the sample records: {error}") from error
    _check_outputs(outputs, expected=len(records))
    _warn_about_output_keys(backend, outputs)
    return outputs[0] if isinstance(inputs, dict) else outputs


def _check_inputs(records: Any) -> None:
    if not isinstance(records, list):
        raise InferenceBackendValidationError(f"the inputs must be a list of dicts, not {type(records).__name__}")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise InferenceBackendValidationError(f"the input at index {index} is not a dict but {_name(record)}")


def _check_outputs(outputs: Any, *, expected: int) -> None:
    if len(outputs) != expected:
        raise InferenceBackendValidationError(
            f"a backend must return one output per input, but returned {len(outputs)} for {expected}"
        )
    if not isinstance(outputs, list):
        raise InferenceBackendValidationError(f"the outputs must be a list of dicts, not {_name(outputs)}")
    for index, output in enumerate(outputs):
        if not isinstance(output, dict | RecordError):
            raise InferenceBackendValidationError(
                f"the output at index {index} is not a dict but {_name(output)}; see ensure_valid_output()"
            )
    for index, output in enumerate(outputs):
        if isinstance(output, RecordError):
            continue
        try:
            json.dumps(output)
        except Exception as error:
            raise InferenceBackendValidationError(
                f"the output at index {index} cannot be written as JSON: {error}; see ensure_valid_output()"
            ) from error


def _warn_about_output_keys(backend: Checkable, outputs: Sequence[dict[str, Any] | RecordError]) -> None:
    declared = set(backend.config.output_keys)
    found = {key for output in outputs if isinstance(output, dict) for key in output}
    for key in sorted(declared - found):
        backend.logger.warning("output_keys declares %r, which no output has", key)


def _name(value: Any) -> str:
    return type(value).__name__
