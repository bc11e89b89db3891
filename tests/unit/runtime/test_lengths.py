"""What a record is padded by: fields, the backend's function, and records that have no length."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from streamproc import InferenceBackend, MultiTaskBackend, Task
from streamproc.errors import InferenceBackendLoadError
from streamproc.loaders import load_backend
from streamproc.runtime.decoders import decode_one_for
from streamproc.runtime.lengths import LengthOf, Meter, of_backend, of_field
from streamproc.runtime.wire import MAX_LENGTH, UNMEASURED

ROOT = Path(__file__).parents[3]


def measured(
    length_of: LengthOf, *values: Any, max_value_bytes: int = 1_000
) -> tuple[list[int], list[tuple[str, str]]]:
    raw = [None if it is None else memoryview(it if isinstance(it, bytes) else orjson.dumps(it)) for it in values]
    lengths, failures = Meter(length_of, "what is measured", max_value_bytes).measure(raw)
    return lengths.tolist(), [(kind, message) for kind, message, _ in failures]


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [
        ("characters", "größe", 5),
        ("bytes", "größe", 7),
        ("characters", "", 0),
        ("bytes", "", 0),
        ("items", [1, [2, 3], None], 3),
        ("items", [], 0),
        ("value", 512, 512),
        ("value", 0, 0),
        ("value", MAX_LENGTH, MAX_LENGTH),
    ],
)
def test_a_field_is_measured_by_its_unit(unit: str, value: object, expected: int) -> None:
    assert measured(of_field("field", unit), {"field": value}) == ([expected], [])


def test_a_nested_field_is_named_by_dots_as_preprocessors_do() -> None:
    length_of = of_field("a.b", "characters")
    assert measured(length_of, {"a": {"b": "xyz"}}, {"a.b": "x"}, {"a.b": "xx", "a": {"b": "xyz"}})[0] == [3, 1, 2]


@pytest.mark.parametrize(
    ("unit", "record", "kind", "said"),
    [
        ("characters", {}, "MissingField", "the record has no field a.b"),
        ("characters", {"a": 3}, "MissingField", "the record has no field a.b"),
        ("characters", {"a": {"b": None}}, "MissingField", "or null in it"),
        ("characters", {"a": {"b": 7}}, "WrongType", "the field a.b is a number, not a text"),
        ("bytes", {"a": {"b": ["x"]}}, "WrongType", "the field a.b is a list, not a text"),
        ("items", {"a": {"b": "text"}}, "WrongType", "the field a.b is a text, not a list"),
        ("items", {"a": {"b": {}}}, "WrongType", "the field a.b is an object, not a list"),
        ("value", {"a": {"b": "12"}}, "NotAnInteger", "of type str"),
        ("value", {"a": {"b": 12.0}}, "NotAnInteger", "of type float"),
        ("value", {"a": {"b": True}}, "NotAnInteger", "of type bool"),
        ("value", {"a": {"b": -1}}, "NotALength", "negative"),
        ("value", {"a": {"b": MAX_LENGTH + 1}}, "NotALength", "beyond"),
    ],
)
def test_a_record_without_the_length_fails_alone_with_a_sentence(unit: str, record: Any, kind: str, said: str) -> None:
    good = {"a": {"b": {"value": 1, "items": [1]}.get(unit, "x")}}
    lengths, failures = measured(of_field("a.b", unit), good, record, good)
    assert lengths == [1, UNMEASURED, 1]
    ((found, message),) = failures
    assert found == kind
    assert said in message


def test_the_bytes_of_a_raw_value_are_its_length() -> None:
    meter = Meter(of_field("value", "bytes"), "the field value", 5, decode_one_for("raw"))
    lengths, failures = meter.measure([memoryview(b""), memoryview(b"abc"), memoryview(b"abcdef"), None])
    assert (list(lengths), failures) == ([0, 3, 0, 0], [])


def test_a_value_that_no_worker_takes_has_length_0_and_is_the_workers_to_judge() -> None:
    too_large = {"text": "x" * 2_000}
    given = (b"no JSON", b"[1]", b'"text"', b"1", None, b"", b"\xff", too_large, {"text": "abc"})
    assert measured(of_field("text", "characters"), *given) == ([0] * 8 + [3], [])


def _raising(error: BaseException) -> LengthOf:
    def length(record: dict[str, Any]) -> int:
        if record.get("bad"):
            raise error
        return 4

    return length


class _UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("what was wrong"),
        asyncio.CancelledError(),
        SystemExit(3),
        MemoryError(),
        _UnprintableError(),
        KeyError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_the_function_raises_fails_its_record_only(error: BaseException) -> None:
    lengths, failures = measured(_raising(error), {}, {"bad": True}, {})
    assert lengths == [4, UNMEASURED, 4]
    ((kind, message),) = failures
    assert kind == type(error).__name__
    assert message.startswith(f"what is measured raised {kind}")


def test_what_the_function_answers_may_be_any_kind_of_integer() -> None:
    answers = iter([np.int64(7), 7, np.float32(7), "7", None, np.int8(-7), 10**400])
    lengths, failures = measured(lambda _: next(answers), *([{}] * 7))
    assert lengths == [7, 7, *[UNMEASURED] * 5]
    assert [kind for kind, _ in failures] == ["NotAnInteger"] * 3 + ["NotALength"] * 2


# -- the backend's function


class Plain(InferenceBackend):
    """Loads what ``length`` needs at its first call, and fails where its weights are loaded."""

    def initialize(self) -> None:
        raise AssertionError("weights are loaded")

    def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def length(self, record: dict[str, Any]) -> int:
        return len(record["text"].split())


class Several(MultiTaskBackend):
    """One task measures by itself, the other leaves it to the backend."""

    def initialize(self) -> None:
        raise AssertionError("weights are loaded")

    def length(self, record: dict[str, Any]) -> int:
        return len(record["text"])

    class Own(Task["Several"]):
        def execute(self, inputs: Any) -> Any:
            return inputs

        def length(self, record: dict[str, Any]) -> int:
            return 2 * self.backend.length(record)

    class Shared(Task["Several"]):
        def execute(self, inputs: Any) -> Any:
            return inputs


class Silent(InferenceBackend):
    """Has no lengths."""

    def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs


class SilentTasks(MultiTaskBackend):
    """Neither has any of these."""

    class Text(Task["SilentTasks"]):
        def execute(self, inputs: Any) -> Any:
            return inputs


def load(name: str) -> Any:
    path = f"tests.unit.runtime.test_lengths:{name}"
    return load_backend(path, loader="local", base_dir=ROOT, config={"verbose": True}, initialize=False)


def test_the_backend_measures_without_being_initialized() -> None:
    backend = load("Plain")
    assert backend.config.verbose
    assert measured(of_backend(backend, "any"), {"text": "three short words"}) == ([3], [])


def test_an_initialize_that_is_not_called_leaves_everything_else_as_it_is() -> None:
    with pytest.raises(Exception, match="weights are loaded"):
        load_backend("tests.unit.runtime.test_lengths:Plain", loader="local", base_dir=ROOT, config={})


def test_a_task_measures_by_itself_or_else_its_backend_does() -> None:
    backend = load("Several")
    assert measured(of_backend(backend, "own"), {"text": "abc"}) == ([6], [])
    assert measured(of_backend(backend, "shared"), {"text": "abc"}) == ([3], [])


@pytest.mark.parametrize(
    ("name", "said"),
    [("Silent", "Silent has no method length"), ("SilentTasks", "neither Text nor SilentTasks has method length")],
)
def test_a_backend_without_the_method_is_told_of_in_one_sentence(name: str, said: str) -> None:
    with pytest.raises(InferenceBackendLoadError, match=said) as caught:
        of_backend(load(name), "text")
    assert "tasks.text.batch.length is backend" in str(caught.value)
    assert "define it, or measure a field" in str(caught.value)
