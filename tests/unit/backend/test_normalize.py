from __future__ import annotations

import base64
import enum
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from streamproc.backend import RecordError
from streamproc.backend.normalize import ensure_native_types, ensure_valid_output


class Level(enum.IntEnum):
    LOW = 1


@pytest.mark.parametrize("value", [1, 1.5, "s", True, None, Level.LOW])
def test_native_values_stay_the_same_object(value: Any) -> None:
    assert ensure_native_types(value) is value


@pytest.mark.parametrize(
    "value", [np.float64(1), np.float32(1), np.int8(1), np.bool_(True), np.str_("s"), np.uint64(2**63)]
)
def test_numpy_scalars_become_python_scalars_even_those_that_are_a_float_or_a_str(value: Any) -> None:
    native = ensure_native_types([{"a": value}])[0]["a"]
    assert type(native) in (int, float, bool, str)
    assert native == value


def test_containers_are_converted_inside() -> None:
    value = {"a": (np.int64(1), [np.zeros((1, 2))]), "b": {np.float32(2)}}
    assert ensure_native_types(value) == {"a": [1, [[[0.0, 0.0]]]], "b": [2.0]}


@pytest.mark.parametrize("value", [object(), b"bytes", frozenset({1}), 1j])
def test_what_cannot_be_converted_is_a_type_error_that_names_the_type(value: Any) -> None:
    with pytest.raises(TypeError, match=type(value).__name__):
        ensure_native_types({"a": [value]})


def test_items_that_are_no_dicts_are_wrapped_and_lists_of_one_unwrapped_first() -> None:
    assert ensure_valid_output([1, [2], [3, 4], {"x": np.int8(5)}, ()]) == [
        {"output": 1},
        {"output": 2},
        {"output": [3, 4]},
        {"x": 5},
        {"output": []},
    ]
    assert ensure_valid_output(np.array([[1], [2]]), parent_key="doubled") == [{"doubled": 1}, {"doubled": 2}]


@pytest.mark.parametrize("dtype", ["f8", "f4", "i4", "?", "U2"])
@pytest.mark.parametrize("shape", [(0,), (3,), (2, 0), (2, 1), (2, 3), (2, 1, 2)])
def test_an_array_gives_what_its_rows_give_one_by_one(shape: tuple[int, ...], dtype: str) -> None:
    array = np.ones(shape, dtype=dtype)
    assert ensure_valid_output(array) == ensure_valid_output(list(array))
    assert repr(ensure_valid_output(array)) == repr(ensure_valid_output(list(array)))


@pytest.mark.parametrize(
    "dtype", ["f8", "f4", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "g", "c16", "M8[s]"]
)
def test_scalars_of_one_kind_give_what_each_gives_alone(dtype: str) -> None:
    numbers: list[float] = [0, 1, 2, 127]
    if dtype in ("f8", "f4", "f2", "g", "c16"):
        numbers += [1 / 3, float("inf"), float("-inf"), float("nan"), -0.0]
    scalars = list(np.array(numbers).astype(dtype))
    together = ensure_valid_output(scalars)
    assert repr(together) == repr([{"output": scalar.tolist()} for scalar in scalars])
    assert repr(together) == repr([ensure_valid_output([scalar, "other"])[0] for scalar in scalars])


def test_what_only_claims_to_be_an_array_is_asked_each_time() -> None:
    class Proxy:
        def __init__(self, claim: type) -> None:
            self.claim = claim

        @property  # type: ignore[misc]  # as proxies do it
        def __class__(self) -> Any:
            return self.claim

        def tolist(self) -> str:
            return "listed"

    assert ensure_native_types([Proxy(np.ndarray), Proxy(np.float64)]) == ["listed", "listed"]
    number = Proxy(int)
    assert ensure_native_types([number])[0] is number


def test_an_array_of_no_dimension_has_no_rows() -> None:
    with pytest.raises(TypeError, match="0-d"):
        ensure_valid_output(np.array(5))


def test_objects_in_an_array_are_converted() -> None:
    array = np.empty(2, dtype=object)
    array[:] = [{"a": np.int64(1)}, (np.int64(2),)]
    assert ensure_valid_output(array) == [{"a": 1}, {"output": 2}]


def test_objects_deeper_in_an_array_stay_what_they_are() -> None:
    array = np.empty((2, 2), dtype=object)
    array[:] = [[np.int64(1), None], ["a", 2]]
    assert repr(ensure_valid_output(array)) == repr([{"output": [np.int64(1), None]}, {"output": ["a", 2]}])


def test_a_record_error_stays_in_its_place() -> None:
    outputs = ensure_valid_output([1, RecordError("too long")])
    assert outputs == [{"output": 1}, RecordError("too long")]


# Libraries that need not be installed: stand-ins under their names, loaded as the real ones would be ------------------


def library(monkeypatch: pytest.MonkeyPatch, name: str, **members: type) -> None:
    module = ModuleType(name)
    for member, kind in members.items():
        kind.__module__ = f"{name}.core"
        setattr(module, member, kind)
    monkeypatch.setitem(sys.modules, name, module)


def test_pandas_series_and_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    class Series:
        def to_list(self) -> list[int]:
            return [1, 2]

    class DataFrame:
        def to_dict(self, orient: str) -> dict[str, Any]:
            return {"orient": orient}

    library(monkeypatch, "pandas", Series=Series, DataFrame=DataFrame)
    assert ensure_native_types([Series(), DataFrame()]) == [[1, 2], {"orient": "split"}]


def test_torch_tensors_are_detached_and_brought_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tensor:
        def __init__(self, values: Any) -> None:
            self.values = np.asarray(values)
            self.path: list[str] = []

        def detach(self) -> Tensor:
            self.path.append("detach")
            return self

        def cpu(self) -> Tensor:
            self.path.append("cpu")
            return self

        def numpy(self) -> Any:
            assert self.path == ["detach", "cpu"]
            return self.values

        def numel(self) -> int:
            return int(self.values.size)

        def item(self) -> Any:
            return self.values.item()

    class FloatTensor(Tensor):
        pass

    class Parameter(Tensor):
        """A user's own subclass, whose module is not torch's."""

    library(monkeypatch, "torch", Tensor=Tensor, FloatTensor=FloatTensor, IntTensor=type("IntTensor", (Tensor,), {}))
    tensors = [FloatTensor([[2.5]]), FloatTensor([1.0, 2.0]), Tensor([7]), Parameter([1, 2])]
    assert ensure_native_types(tensors) == [2.5, [1.0, 2.0], [7], [1, 2]]


def test_tensorflow_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    class EagerTensor:
        def __init__(self, value: Any) -> None:
            self.value = value

        def numpy(self) -> Any:
            return self.value

    library(monkeypatch, "tensorflow", EagerTensor=EagerTensor)
    tensors = [EagerTensor(np.array([[1.5]])), EagerTensor(np.array([1, 2])), EagerTensor(np.float32(0.5))]
    assert ensure_native_types(tensors) == [1.5, [1, 2], 0.5]


def test_pil_images_become_the_base64_text_of_their_png(monkeypatch: pytest.MonkeyPatch) -> None:
    class Image:
        def save(self, file: Any, format: str) -> None:  # noqa: A002 PIL's name
            file.write(format.encode())

    library(monkeypatch, "PIL.Image", Image=Image)
    assert ensure_native_types(Image()) == base64.b64encode(b"PNG").decode()
