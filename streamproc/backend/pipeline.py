"""The four steps of a call, timed one by one: what plain backends and tasks have in common.

    inputs ─► preprocess ─► transform_inputs (if defined) ─► execute ─► transform_outputs (if defined) ─► outputs

Invariants: the exception of a step reaches the caller as ``InferenceBackendRuntimeError`` with its cause chained; the
outputs are a list, or one output for one input; and whether an optional step is defined is looked up at each call, so
that ``initialize()`` may define it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from streamproc.backend.configuration import BackendConfig
from streamproc.backend.metrics import ExecutionMetrics
from streamproc.backend.preprocessors import get_preprocessor
from streamproc.backend.validation import check_io
from streamproc.errors import (
    InferenceBackendInitializationError,
    InferenceBackendRuntimeError,
    name_of_type,
    text_of,
)
from streamproc.logger import BackendLogger, get_logger


class Pipeline(ABC):
    """Calls the steps and keeps the times of the last call."""

    config: BackendConfig
    logger: BackendLogger
    input_model: ClassVar[type[BaseModel] | None] = None
    output_model: ClassVar[type[BaseModel] | None] = None

    def _set_up(self, config: BackendConfig) -> None:
        self.logger = get_logger()
        self.config = config
        self._preprocess = get_preprocessor(config)
        self._batch_size: int | None = None
        self._execution_times: dict[str, float] = {}

    def __call__(self, inputs: dict[str, Any] | list[dict[str, Any]]) -> Any:
        """Run a batch, or one record, through the steps.

        Args:
            inputs: Records, or one record as a dict.

        Returns:
            A list of outputs for records, one output for one record.

        Raises:
            InferenceBackendRuntimeError: A step raised, or the inputs or the outputs are of the wrong type.
        """
        if isinstance(inputs, list):
            batch = inputs
        elif isinstance(inputs, dict):
            batch = [inputs]
        else:
            raise InferenceBackendRuntimeError(
                f"the inputs must be a dict or a list of dicts, not {type(inputs).__name__}"
            )
        self._batch_size = len(batch)
        data = self._run("preprocess", self._preprocess, batch)
        transform_inputs = getattr(self, "transform_inputs", None)
        if transform_inputs is not None:
            data = self._run("transform_inputs", transform_inputs, data)
        data = self._run("execute", self.execute, data)
        transform_outputs = getattr(self, "transform_outputs", None)
        if transform_outputs is not None:
            data = self._run("transform_outputs", transform_outputs, data)
        if not isinstance(data, list):
            last = "execute" if transform_outputs is None else "transform_outputs"
            raise InferenceBackendRuntimeError(
                f"the outputs must be a list, but {last}() of {type(self).__name__} returned {type(data).__name__}"
            )
        if self.config.verbose:
            self.logger.debug("%r", self.get_metrics())
        return data if batch is inputs else data[0]

    def _run(self, step: str, function: Callable[[Any], Any], data: Any) -> Any:
        start = time.perf_counter()
        try:
            result = function(data)
        except Exception as error:
            raise InferenceBackendRuntimeError(
                f"{step}() of {type(self).__name__} failed: {name_of_type(error)}: {text_of(error)}"
            ) from error
        self._execution_times[step] = round((time.perf_counter() - start) * 1000, 5)
        return result

    @abstractmethod
    def execute(self, inputs: Any, /) -> Any:
        """The inference itself, on what ``transform_inputs`` returned, or else on the preprocessed batch."""

    if TYPE_CHECKING:
        # For type checkers only. The base class must not have them: a step that is not defined is not run,
        # and is None in the metrics.
        def transform_inputs(self, inputs: Any, /) -> Any:
            """Optional: from the preprocessed batch to what ``execute`` takes."""

        def transform_outputs(self, outputs: Any, /) -> Any:
            """Optional: from what ``execute`` returned to a list of dicts, one per input."""

    def get_metrics(self) -> ExecutionMetrics:
        """Size and times of the last call.

        Raises:
            pydantic.ValidationError: There was no call that came to its end.
        """
        metrics: dict[str, Any] = {"execution_times": self._execution_times}
        if self._batch_size is not None:
            metrics["batch_size"] = self._batch_size
        return ExecutionMetrics.model_validate(metrics)

    def check_io(self, inputs: dict[str, Any] | list[dict[str, Any]]) -> Any:
        """Run sample records and check that inputs and outputs have the shape that a stream needs.

        Returns:
            The outputs.

        Raises:
            InferenceBackendValidationError: They have not.
            InferenceBackendRuntimeError: The backend failed on them.
        """
        return check_io(self, inputs)

    def validate(self, inputs: dict[str, Any] | list[dict[str, Any]]) -> Any:
        """The older name of ``check_io``."""
        return self.check_io(inputs)

    def ready(self) -> bool:
        """Whether batches may be sent. Calling never asks; a worker of the pool that is not ready is given no batch."""
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"


def no_initialize() -> None:
    """In the place of a backend's ``initialize`` where its weights are not needed."""


def run_initialize(backend: Any, initialize: Callable[[], object]) -> None:
    """Call and time a backend's ``initialize``; ``no_initialize`` is neither called nor told of.

    Raises:
        InferenceBackendInitializationError: It raised; the cause is chained.
    """
    if initialize is no_initialize:
        return
    name = type(backend).__name__
    start = time.perf_counter()
    try:
        initialize()
    except Exception as error:
        raise InferenceBackendInitializationError(
            f"initialize() of {name} failed: {name_of_type(error)}: {text_of(error)}"
        ) from error
    get_logger().info("Initialized %s in %.4f ms", name, (time.perf_counter() - start) * 1000)
