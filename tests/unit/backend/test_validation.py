from __future__ import annotations

import logging
from typing import Any

import pytest

from streamproc.backend import InferenceBackend, RecordError
from streamproc.errors import InferenceBackendRuntimeError, InferenceBackendValidationError


class Answers(InferenceBackend):
    answer: Any = None

    def execute(self, inputs: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return inputs if self.answer is None else self.answer


def backend_that_answers(answer: Any, **config: Any) -> Answers:
    backend = Answers(**config)
    backend.answer = answer
    return backend


def test_both_names_give_the_outputs() -> None:
    backend = Answers()
    assert backend.check_io([{"a": 1}]) == [{"a": 1}]
    assert backend.validate([{"a": 1}]) == [{"a": 1}]


def test_a_dict_is_wrapped_and_answered_by_one_output() -> None:
    assert Answers().check_io({"a": 1}) == {"a": 1}


@pytest.mark.parametrize(("inputs", "message"), [("text", "list of dicts"), ([{}, 5], "index 1")])
def test_inputs_of_the_wrong_shape_are_named(inputs: Any, message: str) -> None:
    with pytest.raises(InferenceBackendValidationError, match=message):
        Answers().check_io(inputs)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([{}], "returned 1 for 2"),
        ([{}, 5], "index 1"),
        ([{}, {"a": {1, 2}}], "index 1.*JSON"),
        ([{"a": object()}, {}], "index 0.*JSON"),
    ],
)
def test_outputs_of_the_wrong_shape_are_named(answer: Any, message: str) -> None:
    with pytest.raises(InferenceBackendValidationError, match=message):
        backend_that_answers(answer).check_io([{}, {}])


def test_a_failure_of_the_backend_itself_is_no_validation_error() -> None:
    with pytest.raises(InferenceBackendRuntimeError, match="no weights") as caught:
        backend_that_answers(ValueError("no weights")).check_io([{}])
    assert isinstance(caught.value.__cause__, InferenceBackendRuntimeError)


def test_a_record_that_is_failed_on_purpose_passes() -> None:
    answer = [{"a": 1}, RecordError("too long")]
    assert backend_that_answers(answer, output_keys=["a"]).check_io([{}, {}]) == answer


def test_output_keys_that_no_record_has_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    backend = backend_that_answers([{"a": 1}, {"b": 1}], output_keys=["c", "a", "b", "d"])
    with caplog.at_level(logging.WARNING, "streamproc.backend"):
        backend.check_io([{}, {}])
    assert [record.getMessage().split()[2] for record in caplog.records] == ["'c',", "'d',"]
