from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
from pydantic import ValidationError

from streamproc.backend import BackendConfig, InferenceBackend
from streamproc.backend.metrics import ExecutionMetrics, ExecutionTimes
from streamproc.errors import (
    InferenceBackendInitializationError,
    InferenceBackendRuntimeError,
    PreprocessorInitError,
    PreprocessorRuntimeError,
)


class Echo(InferenceBackend):
    def execute(self, inputs: Any) -> Any:
        return inputs


class Full(Echo):
    def transform_inputs(self, inputs: list[dict[str, Any]]) -> list[int]:
        return [record["number"] for record in inputs]

    def execute(self, inputs: list[int]) -> list[int]:
        return [2 * number for number in inputs]

    def transform_outputs(self, outputs: list[int]) -> list[dict[str, Any]]:
        return [{"doubled": number} for number in outputs]


def test_initialize_runs_once_and_last_with_configuration_and_preprocessor_in_place() -> None:
    seen: list[Any] = []

    class Backend(Echo):
        def initialize(self) -> None:
            seen.append((self.config.feature_names, self([{"a": 1, "b": 2}]), self.logger is not None))

    backend = Backend(feature_names=["a"])
    backend([{"a": 2}])
    assert seen == [(["a"], [{"a": 1}], True)]


def test_an_exception_in_initialize_is_chained_to_an_initialization_error() -> None:
    class Backend(Echo):
        def initialize(self) -> None:
            raise OSError("no weights at /models")

    with pytest.raises(InferenceBackendInitializationError, match=r"Backend.*no weights at /models") as caught:
        Backend()
    assert isinstance(caught.value.__cause__, OSError)


def test_a_configuration_that_cannot_work_is_refused_before_initialize_runs() -> None:
    class Backend(Echo):
        def initialize(self) -> None:
            pytest.fail("the weights were loaded for nothing")

    with pytest.raises(PreprocessorInitError, match="feature_names"):
        Backend(input_format="numpy")
    with pytest.raises(ValidationError):
        Backend(input_format="parquet")


def test_a_backend_without_execute_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="execute"):
        type("Backend", (InferenceBackend,), {})()


def test_the_base_class_has_no_optional_steps() -> None:
    assert not hasattr(InferenceBackend, "transform_inputs")
    assert not hasattr(InferenceBackend, "transform_outputs")
    assert not hasattr(Echo(), "transform_inputs")


def test_the_steps_run_in_their_order() -> None:
    assert Full()([{"number": 1}, {"number": 2}]) == [{"doubled": 2}, {"doubled": 4}]


def test_one_dict_in_gives_one_dict_out() -> None:
    assert Full()({"number": 4}) == {"doubled": 8}


def test_an_empty_batch_is_a_batch() -> None:
    assert Full()([]) == []


@pytest.mark.parametrize("step", ["transform_inputs", "execute", "transform_outputs"])
def test_an_exception_in_a_step_names_the_step_and_is_chained(step: str) -> None:
    class Backend(Full):
        pass

    def fail(_self: Any, _data: Any) -> None:
        raise ZeroDivisionError("one over nothing")

    setattr(Backend, step, fail)
    with pytest.raises(InferenceBackendRuntimeError, match=rf"^{step}\(\).*one over nothing") as caught:
        Backend()([{"number": 1}])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_in_the_preprocessor_is_chained_through_its_own_kind() -> None:
    with pytest.raises(InferenceBackendRuntimeError, match=r"^preprocess\(\)") as caught:
        Echo(feature_names=["a"])([5])  # type: ignore[list-item]
    assert isinstance(caught.value.__cause__, PreprocessorRuntimeError)
    assert isinstance(caught.value.__cause__.__cause__, AttributeError)


@pytest.mark.parametrize("inputs", [None, "text", ({"number": 1},), 5])
def test_inputs_that_are_neither_dict_nor_list_are_refused(inputs: Any) -> None:
    with pytest.raises(InferenceBackendRuntimeError, match="inputs must be a dict or a list"):
        Full()(inputs)


@pytest.mark.parametrize("outputs", [None, {"a": 1}, ({"a": 1},)])
def test_outputs_that_are_no_list_are_refused(outputs: Any) -> None:
    class Backend(InferenceBackend):
        def execute(self, inputs: Any) -> Any:  # noqa: ARG002
            return outputs

    with pytest.raises(InferenceBackendRuntimeError, match=rf"execute\(\).*{type(outputs).__name__}"):
        Backend()([{"a": 1}])


def test_a_step_that_initialize_defines_is_run() -> None:
    class Backend(Echo):
        def initialize(self) -> None:
            # No function of its own name: the step is known by the attribute, not by __name__.
            self.transform_inputs = functools.partial(map, str)  # type: ignore[method-assign]

        def execute(self, inputs: Any) -> Any:
            return list(inputs)

    backend = Backend()
    assert backend([{"a": 1}]) == ["{'a': 1}"]
    assert backend.get_metrics().execution_times.transform_inputs is not None


def test_calling_does_not_ask_whether_the_backend_is_ready() -> None:
    class Backend(Echo):
        def ready(self) -> bool:
            return False

    assert Backend()({"a": 1}) == {"a": 1}
    assert Echo().ready() is True


def test_absent_steps_are_none_in_the_metrics() -> None:
    backend = Echo()
    backend([{"a": 1}] * 3)
    metrics = backend.get_metrics()
    assert metrics.batch_size == 3
    assert metrics.execution_times.transform_inputs is None
    assert metrics.execution_times.transform_outputs is None
    assert metrics.execution_times.execute >= 0


def test_the_total_is_the_sum_of_the_steps_that_ran() -> None:
    times = ExecutionTimes(preprocess=1.5, execute=2.25, transform_outputs=0.25)
    assert ExecutionMetrics(batch_size=1, execution_times=times, total_execution_time=99).total_execution_time == 4.0
    assert ExecutionMetrics(batch_size=1, execution_times=times).model_dump() == {
        "batch_size": 1,
        "execution_times": {
            "preprocess": 1.5,
            "transform_inputs": None,
            "execute": 2.25,
            "transform_outputs": 0.25,
        },
        "total_execution_time": 4.0,
    }


def test_times_are_milliseconds_rounded_to_five_places(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.0015, 1.0, 1.0 + 1 / 3000])
    backend = Echo()
    monkeypatch.setattr("streamproc.backend.pipeline.time.perf_counter", lambda: next(ticks))
    backend([{"a": 1}])
    times = backend.get_metrics().execution_times
    assert (times.preprocess, times.execute) == (1.5, 0.33333)


def test_metrics_before_the_first_call_are_refused() -> None:
    with pytest.raises(ValidationError):
        Echo().get_metrics()


def test_verbose_logs_the_metrics_of_each_call(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "streamproc.backend"):
        quiet, verbose = Echo(), Echo(verbose=True)
        caplog.clear()
        quiet([{"a": 1}])
        assert not caplog.messages
        verbose([{"a": 1}])
        verbose([{"a": 1}])
    assert len([message for message in caplog.messages if message.startswith("ExecutionMetrics(")]) == 2


class ThresholdConfig(BackendConfig):
    threshold: float
    labels: list[str] = ["no", "yes"]  # noqa: RUF012 pydantic copies it


class Threshold(Echo):
    backend_config_model = ThresholdConfig
    config: ThresholdConfig


def test_a_configuration_model_of_its_own_adds_fields_with_and_without_defaults() -> None:
    backend = Threshold(threshold="0.5", verbose=True)
    assert (backend.config.threshold, backend.config.labels, backend.config.verbose) == (0.5, ["no", "yes"], True)
    with pytest.raises(ValidationError, match="threshold"):
        Threshold()


def test_the_repr_shows_the_configuration() -> None:
    assert repr(Threshold(threshold=0.5)).startswith("Threshold(ThresholdConfig(")
