"""What happens to a batch before the backend's own steps: nothing, records to records, or records to an array.

A preprocessor reads its configuration once, when it is made: what can be refused is refused there, and what can be
worked out ahead is worked out there. Invariants: the input is never edited, and whatever goes wrong with a batch is a
``PreprocessorRuntimeError`` with its cause chained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from streamproc.backend.arrays import to_array
from streamproc.backend.compiled import compile_rows
from streamproc.backend.configuration import BackendConfig, InputFormats
from streamproc.backend.paths import flatten_record
from streamproc.backend.plans import choose_plan
from streamproc.backend.shapes import PlainRecords, read_plain
from streamproc.errors import PreprocessorInitError, PreprocessorRuntimeError, UnknownPreprocessorError
from streamproc.logger import get_logger


class Preprocessor(ABC):
    """A step from the batch as it arrives to the batch as the backend wants it."""

    def __init__(self, config: BackendConfig) -> None:
        self.config = config

    def __call__(self, raw_inputs: Any) -> Any:
        """Preprocess a batch.

        Raises:
            PreprocessorRuntimeError: The batch cannot be preprocessed.
        """
        try:
            return self.process(raw_inputs)
        except Exception as error:
            raise PreprocessorRuntimeError(f"the inputs cannot be preprocessed: {error}") from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"

    @abstractmethod
    def process(self, raw_inputs: Any) -> Any:
        """Preprocess a batch; may raise anything."""


class PassthroughPreprocessor(Preprocessor):
    """Hands on the very object it is given."""

    def process(self, raw_inputs: Any) -> Any:
        """The inputs."""
        return raw_inputs


class RecordsPreprocessor(Preprocessor):
    """Renames, filters and flattens records; hands on the very object it is given if asked for none of these."""

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        self.passthrough = not (config.rename_fields or config.feature_names or config.flatten_nested_inputs)
        if self.passthrough:
            get_logger().debug("The configuration asks for no preprocessing: records pass through as they are")
        self._plan = None if self.passthrough else choose_plan(config)

    def process(self, raw_inputs: Any) -> Any:
        """The records as the configuration asks for them."""
        return raw_inputs if self._plan is None else self._plan(raw_inputs)


class NumpyPreprocessor(Preprocessor):
    """Makes an array, rows by features, of the dtype that numpy infers.

    A missing value is None, which makes the dtype object.
    """

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        if not config.feature_names:
            raise PreprocessorInitError(
                "input_format 'numpy' needs feature_names, which name the columns and their order; set feature_names"
            )
        old_names = {new: old for old, new in config.rename_fields.items()}
        self.features = [old_names.get(feature, feature) for feature in config.feature_names]
        self._delimiter = config.nested_field_delimiter or "."
        self._plain = PlainRecords(self._delimiter)
        # A rename may have an old name that is no text; it is a key, and cannot be nested.
        self._paths = [name.split(self._delimiter) if isinstance(name, str) else [name] for name in self.features]
        self._read_keys = self._read_paths = None
        if all(type(name) is str for name in self.features):
            self._read_keys = compile_rows([[name] for name in self.features])
            self._read_paths = compile_rows(self._paths)

    def process(self, raw_inputs: Any) -> np.ndarray[Any, Any]:
        """The batch as an array."""
        if not isinstance(raw_inputs, list):
            raise ValueError(f"the inputs must be a list of dicts, not {type(raw_inputs).__name__}")  # noqa: TRY004 as below
        return to_array(self._rows(raw_inputs))

    def _rows(self, records: list[Any]) -> Sequence[Sequence[Any]]:
        # Exact dicts only: others may answer for a key that they do not have.
        if self._read_keys is not None and self._read_paths is not None and set(map(type, records)) <= {dict}:
            # A key of just that name goes before a nested path, so that where all are keys nothing else matters.
            with suppress(KeyError):
                return self._read_keys(records)
            if self._plain.has_all(records):
                with suppress(KeyError, TypeError):
                    rows = self._read_paths(records)
                    if len(rows) == len(records):
                        return rows
        return [
            self._read_plain(record) if self._plain.has(record) else self._read_any(record, index)
            for index, record in enumerate(records)
        ]

    def _read_plain(self, record: dict[str, Any]) -> list[Any]:
        # A key of the record is read as it is, even where it is a dict.
        return [record.get(path[0]) if len(path) == 1 else read_plain(record, path) for path in self._paths]

    def _read_any(self, record: Any, index: int) -> list[Any]:
        if not isinstance(record, dict):
            # packflow's type, which is the chained cause that a caller may look at.
            raise ValueError(f"the record at index {index} is not a dict but {type(record).__name__}")  # noqa: TRY004
        flat: dict[Any, Any] | None = None
        row = []
        for feature in self.features:
            if feature in record:
                row.append(record[feature])
                continue
            if flat is None:
                flat = flatten_record(record, self._delimiter)
            row.append(flat.get(feature))
        return row


_BY_FORMAT: dict[InputFormats, type[Preprocessor]] = {
    InputFormats.PASSTHROUGH: PassthroughPreprocessor,
    InputFormats.RECORDS: RecordsPreprocessor,
    InputFormats.NUMPY: NumpyPreprocessor,
}


def get_preprocessor(config: BackendConfig) -> Preprocessor:
    """The preprocessor for ``config.input_format``.

    Raises:
        PreprocessorInitError: It cannot work with the rest of the configuration.
        UnknownPreprocessorError: There is none for that format.
    """
    try:
        # A configuration with use_enum_values holds the text.
        preprocessor = _BY_FORMAT[InputFormats(config.input_format)]
    except ValueError:
        known = ", ".join(each.value for each in InputFormats)
        raise UnknownPreprocessorError(
            f"input_format {config.input_format!r} names no preprocessor; use one of: {known}"
        ) from None
    return preprocessor(config)
