"""Outputs as JSON can hold them: plain Python values in place of what numpy, pandas, torch, TensorFlow and PIL return.

Invariants: no library is imported here but numpy. An object of another library proves that the library is loaded
already, so its module is found in ``sys.modules``. A whole array is converted in one call where that gives exactly what
converting it item by item would give.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable, Iterable
from operator import methodcaller
from typing import Any

import numpy as np

from streamproc.backend.record_error import RecordError

_Converter = Callable[[Any], Any]

_NATIVE: frozenset[type] = frozenset({str, int, float, bool, type(None)})
_ARE_NATIVE = _NATIVE.issuperset
_TO_LIST = methodcaller("tolist")

# Where Python's own type takes a scalar of numpy's as ``tolist`` does, in a tenth of its time.
_SCALARS: dict[type[np.generic], Callable[[Any], Any]] = {
    **dict.fromkeys((np.float16, np.float32, np.float64), float),
    **dict.fromkeys((np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64), int),
    np.bool_: bool,
}


def ensure_native_types(obj: Any) -> Any:
    """``obj`` with every value in it made a plain Python value.

    Numbers, text, booleans and None stay as they are; arrays, Series and tensors become lists or scalars, a DataFrame
    its ``to_dict("split")``, a PIL image the base64 text of its PNG; what dicts, lists, tuples and sets hold, likewise.

    Raises:
        TypeError: There is a value of another type in it.
    """
    kind = type(obj)
    if kind in _NATIVE:
        return obj
    if kind is dict:
        return _convert_dict(obj)
    if kind is list:
        # One look in C at all the types; most lists hold plain numbers.
        return obj.copy() if _ARE_NATIVE(map(type, obj)) else [ensure_native_types(value) for value in obj]
    converter = _CONVERTERS.get(kind)
    return _convert(obj) if converter is None else converter(obj)


def _convert_dict(obj: dict[Any, Any]) -> dict[Any, Any]:
    # Tested here, since a call for each value would take twice as long.
    return {key: value if type(value) in _NATIVE else ensure_native_types(value) for key, value in obj.items()}


def _convert(obj: Any) -> Any:
    kind = type(obj)
    if isinstance(obj, np.ndarray | np.generic):
        # Before the test for numbers, which numpy's float64 would pass as it is.
        if issubclass(kind, np.ndarray | np.generic):
            _CONVERTERS[kind] = _TO_LIST
        return obj.tolist()
    if isinstance(obj, str | int | float):
        return obj
    if kind not in _CONVERTERS:
        _CONVERTERS[kind] = _find_converter(kind)
    converter = _CONVERTERS[kind]
    if converter is not None:
        return converter(obj)
    if isinstance(obj, dict):
        return _convert_dict(obj)
    if isinstance(obj, list | tuple | set):
        return [ensure_native_types(value) for value in obj]
    raise TypeError(
        f"a value of type {kind.__module__}.{kind.__qualname__} cannot be made a plain Python value; "
        "convert it in transform_outputs()"
    )


def ensure_valid_output(output: Iterable[Any], parent_key: str = "output") -> list[Any]:
    """One dict per item of ``output``, with plain Python values.

    An item that is no dict becomes ``{parent_key: item}``, a list of one value counting as that value.
    A ``RecordError`` stays what it is.

    Raises:
        TypeError: An item has a value of a type that cannot be converted.
    """
    # A subclass of ndarray may iterate otherwise than it converts, as a matrix does.
    if type(output) is np.ndarray:
        # Objects are converted only where they are the items; deeper in an array they stay what they are.
        if output.ndim > 1 or (output.ndim == 1 and output.dtype != object):
            inner = output[:, 0] if output.ndim > 1 and output.shape[1] == 1 else output
            return [{parent_key: item} for item in inner.tolist()]
        output = list(output)
    if type(output) is not list:
        return [_as_record(item, parent_key) for item in output]
    kinds = set(map(type, output))
    if kinds == {dict}:
        return list(map(_convert_dict, output))
    if kinds <= _NATIVE:
        return [{parent_key: item} for item in output]
    if len(kinds) == 1 and (kind := kinds.pop()) in _SCALARS:
        return [{parent_key: item} for item in np.fromiter(output, dtype=kind, count=len(output)).tolist()]
    return [_as_record(item, parent_key) for item in output]


def _as_record(item: Any, parent_key: str) -> Any:
    if type(item) is RecordError:
        return item
    value = ensure_native_types(item)
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return {parent_key: value}


def _find_converter(kind: type[Any]) -> _Converter | None:
    """The converter for objects of that type, by the library that it or one of its bases comes from."""
    for base in kind.__mro__:
        find = _LIBRARIES.get(base.__module__.partition(".")[0])
        converter = find(kind) if find is not None else None
        if converter is not None:
            return converter
    return None


def _for_pandas(kind: type) -> _Converter | None:
    pandas = sys.modules["pandas"]
    if issubclass(kind, pandas.Series):
        return lambda series: series.to_list()
    if issubclass(kind, pandas.DataFrame):
        return lambda frame: frame.to_dict("split")
    return None


def _for_torch(kind: type) -> _Converter | None:
    return _convert_torch if issubclass(kind, sys.modules["torch"].Tensor) else None


def _convert_torch(tensor: Any) -> Any:
    torch = sys.modules["torch"]
    # packflow makes scalars of these two kinds only; of the others, a tensor of shape (1,) is a list of one.
    if isinstance(tensor, (torch.FloatTensor, torch.IntTensor)) and tensor.numel() == 1:
        return tensor.item()
    return tensor.detach().cpu().numpy().tolist()


def _for_tensorflow(kind: type) -> _Converter | None:
    return _convert_tensorflow if hasattr(kind, "numpy") else None


def _convert_tensorflow(tensor: Any) -> Any:
    value = tensor.numpy()
    if isinstance(value, np.ndarray | np.generic):
        return value.item() if value.size == 1 else value.tolist()
    return value


def _for_pil(kind: type) -> _Converter | None:
    module = sys.modules.get("PIL.Image")
    return _encode_png if module is not None and issubclass(kind, module.Image) else None


def _encode_png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


_LIBRARIES: dict[str, Callable[[type], _Converter | None]] = {
    "pandas": _for_pandas,
    "torch": _for_torch,
    "tensorflow": _for_tensorflow,
    "PIL": _for_pil,
}

# By exact type, None for a type of no library: a program has few, and looking through the bases takes longer. An object
# that only claims to be an array, as a proxy's ``__class__`` does, is asked each time.
_CONVERTERS: dict[type[Any], _Converter | None] = {**_SCALARS, np.ndarray: np.ndarray.tolist}
