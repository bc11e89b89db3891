"""What a backend declares of its records, as JSON Schemas."""

from __future__ import annotations

import logging
from typing import Any

import orjson
import pytest
from pydantic import BaseModel, Field, computed_field

from streamproc import InferenceBackend, MultiTaskBackend, Task
from streamproc.backend.models import declared_schemas
from streamproc.backend.tasks import resolve_task


class Words(BaseModel):
    """A text."""

    text: str = Field(min_length=1)
    limit: int = 3


class Mood(BaseModel):
    label: str

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sure(self) -> bool:
        return True


class NoSchema(BaseModel, arbitrary_types_allowed=True):
    thing: logging.Logger


class Plain(InferenceBackend):
    def execute(self, inputs: Any) -> Any:
        return inputs


def schemas(task: object) -> Any:
    return orjson.loads(orjson.dumps(declared_schemas(task)))


def test_a_backend_that_declares_nothing_has_no_schema() -> None:
    assert schemas(Plain()) == {}


def test_inputs_are_described_as_they_come_and_outputs_as_they_are_written() -> None:
    class Backend(Plain):
        input_model = Words
        output_model = Mood

    found = schemas(Backend())
    assert found["input"]["required"] == ["text"]
    assert found["input"]["description"] == "A text."
    assert found["output"]["required"] == ["label", "sure"]


def test_each_task_of_a_backend_has_models_of_its_own() -> None:
    class Several(MultiTaskBackend):
        class Text(Task["Several"]):
            input_model = Words

            def execute(self, inputs: Any) -> Any:
                return inputs

        class Image(Task["Several"]):
            output_model = Mood

            def execute(self, inputs: Any) -> Any:
                return inputs

    backend = Several()
    assert set(schemas(resolve_task(backend, "text"))) == {"input"}
    assert set(schemas(resolve_task(backend, "image"))) == {"output"}


def test_weights_of_that_name_are_none_of_our_business(caplog: pytest.LogCaptureFixture) -> None:
    class Backend(Plain):
        def initialize(self) -> None:
            self.__dict__["input_model"] = object()

    assert schemas(Backend()) == {}
    assert caplog.records == []


class _Mode:
    """A model by its type, which makes what is no JSON of itself."""


def _too_large() -> type[BaseModel]:
    class Large(BaseModel):
        text: str = Field(description="x" * 1_048_577)

    return Large


def _no_json() -> type[BaseModel]:
    class Odd(BaseModel):
        text: str = Field(json_schema_extra={"odd": _Mode()})  # type: ignore[dict-item]

    return Odd


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("Words", "it is no class derived from pydantic.BaseModel"),
        (dict, "it is no class derived from pydantic.BaseModel"),
        (NoSchema, "PydanticInvalidForJsonSchema"),
        (_too_large(), "more than 1,048,576 bytes"),
        (_no_json(), "PydanticSerializationError"),
    ],
)
def test_what_cannot_be_described_is_told_and_costs_the_worker_nothing(
    model: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = type("Backend", (Plain,), {"input_model": model, "output_model": Mood})
    with caplog.at_level(logging.WARNING):
        assert set(schemas(backend())) == {"output"}
    (told,) = caplog.messages
    assert told.startswith("input_model of Backend is not in the documentation: ")
    assert why in told
