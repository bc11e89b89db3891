"""streamproc's backend against packflow's, on configurations, records and outputs made at random from fixed seeds.

What is compared: outputs with their types, their key order and numpy's dtypes and shapes; exceptions by the names of
the whole chain; the order of the steps; the metrics' fields. Each test says how many of its cases must end which way,
so that a generator which no longer reaches a path fails instead of passing for want of cases.
"""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
import packflow
import packflow.utils
import pytest
from loguru import logger as loguru_logger
from packflow.backend.configuration import BackendConfig as PackflowConfig
from packflow.backend.preprocessors import get_preprocessor as packflow_preprocessor

import streamproc.utils
from streamproc.backend import BackendConfig, InferenceBackend
from streamproc.backend.preprocessors import get_preprocessor

Outcome = tuple[str, Any]


@pytest.fixture(autouse=True, scope="module")
def _packflow_is_silent() -> Iterator[None]:
    loguru_logger.disable("packflow")
    yield
    loguru_logger.enable("packflow")


def outcome_of(action: Callable[..., Any], *arguments: Any) -> Outcome:
    try:
        return "returned", action(*arguments)
    except Exception as error:  # noqa: BLE001 what is raised is compared
        return "raised", chain_of(error)


def chain_of(error: BaseException) -> list[str]:
    names = []
    following: BaseException | None = error
    while following is not None:
        names.append(type(following).__name__)
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    return names


def describe(value: Any, around: tuple[int, ...] = ()) -> Any:
    """A form that is equal for two values only if they are alike in type, order and content."""
    if id(value) in around:
        return "itself", around.index(id(value))
    inside = (*around, id(value))
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.shape, describe(value.tolist(), inside)
    if isinstance(value, dict):
        return type(value).__name__, [(describe(key), describe(item, inside)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [describe(item, inside) for item in value]
    if isinstance(value, MappingProxyType):
        return "mappingproxy", describe(dict(value), inside)
    text = sorted(map(repr, value)) if isinstance(value, set) else repr(value)
    return type(value).__name__, "" if type(value) is object else text


# Records and configurations ------------------------------------------------------------------------------------------

KEYS = ["a", "b", "c", "d", "e", "x", "y"]
ODD_KEYS = ["", "a.b", "b.c", "a:b", "a__b", "a_", "_b", "0", "1", ".", "a.", ".b"]
DELIMITERS = [".", ".", ".", ":", "__", "::", "_", ""]


class Generator:
    """Makes cases; ``oddness`` is the chance of whatever JSON records seldom have."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.oddness = 0.0

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def key(self) -> Any:
        if self.chance(self.oddness):
            return self.random.choice([*ODD_KEYS, *ODD_KEYS, 1, True, None, ("t",), 2.5])
        return self.random.choice(KEYS)

    def value(self, depth: int) -> Any:
        if depth > 0 and self.chance(0.35):
            return {self.key(): self.value(depth - 1) for _ in range(self.random.randrange(4))}
        if depth > 0 and self.chance(0.1):
            return [self.value(depth - 1) for _ in range(self.random.randrange(4))]
        if self.chance(self.oddness):
            odd: list[Any] = [
                MappingProxyType({"b": 1, "c": {"d": 2}}),
                MappingProxyType({}),
                OrderedDict(b=1, a={"c": 3}),
                np.float64(0.5),
                np.int64(7),
                np.array([1, 2]),
                (1, 2),
                {1, 2},
                b"bytes",
                10**30,
            ]
            return self.random.choice(odd)
        return self.random.choice([None, 0, 1, 3, 2.5, True, False, "", "text", 1, 2, 0.5])

    def record(self, schema: list[Any]) -> Any:
        if self.chance(self.oddness / 3):
            odd: list[Any] = [
                None,
                7,
                "a",
                [],
                ["a"],
                [("a", 1)],
                {"a", "b"},
                ("a",),
                OrderedDict(b=1, a=None, c={"d": 1}),
                defaultdict(int, a=1),
                MappingProxyType({"a": 1}),
            ]
            return self.random.choice(odd)
        record = {key: self.value(3) for key in schema if not self.chance(0.1)}
        if self.chance(0.3):
            record[self.key()] = self.value(2)
        if self.chance(self.oddness) and len(record) > 1:
            # One object in two places: writing below one of them would show below the other.
            first, second = self.random.sample(list(record), 2)
            record[first] = record[second]
        return record

    def numbers(self, schema: list[Any]) -> dict[str, Any]:
        """A record of numbers, nested alike each time: what ends as an array that is not of objects."""
        return {
            key: {inner: {"a": self.random.random(), "b": self.random.randrange(9)} for inner in "abc"}
            if index % 2
            else self.random.random()
            for index, key in enumerate(schema)
        }

    def name(self, delimiter: str) -> str:
        if delimiter and self.chance(0.4):
            return delimiter.join(self.random.choice(KEYS) for _ in range(self.random.choice([2, 2, 3])))
        return self.random.choice(ODD_KEYS if self.chance(self.oddness) else KEYS)

    def configuration(self) -> dict[str, Any]:
        delimiter = self.random.choice(DELIMITERS)
        # One kind of names per configuration: else nearly every one would have a nested name.
        names = self.random.choice([delimiter, ""])
        renames: dict[Any, Any] = {}
        if self.chance(0.5):
            renames = {self.name(names): self.name(names) for _ in range(self.random.randrange(1, 4))}
        if self.chance(self.oddness):
            renames[self.random.choice([1, "a", None, ("a",), "b"])] = self.random.choice([1, "z", None, ["u"], ("t",)])
        features = [self.name(names) for _ in range(self.random.randrange(1, 6))] if self.chance(0.7) else []
        if renames and features and self.chance(0.5):
            features.append(self.random.choice([new for new in renames.values() if isinstance(new, str)] or ["a"]))
        return {
            "input_format": self.random.choice(["records", "records", "numpy", "passthrough"]),
            "rename_fields": renames,
            "feature_names": features,
            "flatten_nested_inputs": self.chance(0.4),
            "flatten_lists": self.chance(0.5),
            "nested_field_delimiter": delimiter,
            "ignore_delimiter_collisions": self.chance(0.4),
        }

    def batches(self) -> Iterator[list[Any]]:
        schema = [self.key() for _ in range(self.random.randrange(1, 7))]
        for _ in range(4):
            if self.chance(0.3):
                yield [self.numbers(schema) for _ in range(self.random.randrange(1, 5))]
            else:
                yield [self.record(schema) for _ in range(self.random.randrange(5))]


def test_preprocessors_give_what_packflows_give() -> None:
    generator = Generator(seed=20_240)
    ends: Counter[str] = Counter()
    for number in range(2_500):
        # The first half is ordinary, so that the compiled plans and not only the reference are compared.
        generator.oddness = random.Random(number).choice([0.0, 0.0, 0.02, 0.1, 0.3])
        values = generator.configuration()
        theirs = outcome_of(packflow_preprocessor, PackflowConfig(**copy.deepcopy(values)))
        ours = outcome_of(get_preprocessor, BackendConfig(**copy.deepcopy(values)))
        assert ours[0] == theirs[0], values
        if ours[0] == "raised":
            assert ours[1] == theirs[1], values
            ends["refused at construction"] += 1
            continue
        for batch in generator.batches():
            given, kept = copy_batch(batch), describe(batch)
            expected = outcome_of(theirs[1], copy_batch(batch))
            actual = outcome_of(ours[1], given)
            assert (actual[0], describe(actual[1])) == (expected[0], describe(expected[1])), (values, batch)
            assert describe(given) == kept, ("the input was edited", values, batch)
            if actual[0] == "returned" and values["input_format"] == "passthrough":
                assert actual[1] is given
            ends[f"{values['input_format']} {actual[0]}"] += 1
            if isinstance(actual[1], np.ndarray):
                ends[f"array of {actual[1].dtype.kind}"] += 1
            elif actual[0] == "raised":
                ends[actual[1][1]] += 1
    assert ends.total() > 8_000
    assert ends["refused at construction"] > 100
    assert ends["records returned"] > 3_000
    assert ends["records raised"] > 500
    assert ends["numpy returned"] > 1_000
    assert ends["numpy raised"] > 30
    assert ends["array of O"] > 300
    assert ends["array of f"] > 50
    assert {"PreprocessorRuntimeError", "ValueError", "AttributeError", "TypeError"} <= set(ends)


def copy_batch(batch: list[Any]) -> list[Any]:
    """A deep copy in which what is shared stays shared; mapping proxies, which cannot be copied, are made anew."""
    proxies = {id(value): value for value in _walk(batch) if isinstance(value, MappingProxyType)}
    return copy.deepcopy(batch, {key: MappingProxyType(dict(value)) for key, value in proxies.items()})


def _walk(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, dict | MappingProxyType):
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _walk(item)


def test_renames_onto_and_below_each_other_leave_the_input_alone_and_the_outputs_as_packflows() -> None:
    generator = Generator(seed=77)
    written_below_values = 0
    for _ in range(1_500):
        paths = ["a", "b", "a.b", "a.c", "a.b.c", "b.a", "x"]
        values = {
            "rename_fields": {key: generator.random.choice(paths) for key in generator.random.sample(paths, 2)},
            "feature_names": generator.random.sample(paths, generator.random.randrange(4)),
        }
        shared = {"b": 1, "c": {"d": 2}}
        batch = [{"a": shared, "b": shared, "x": generator.value(2)}, {"a": {"b": shared}, "x": shared}]
        given = copy.deepcopy(batch)
        theirs = copy.deepcopy(batch)
        expected = packflow_preprocessor(PackflowConfig(**values))(theirs)
        actual = get_preprocessor(BackendConfig(**values))(given)
        assert describe(actual) == describe(expected), values
        assert describe(given) == describe(batch), values
        written_below_values += describe(theirs) != describe(batch)
    # packflow edits its input in these; otherwise the test would show nothing.
    assert written_below_values > 50


# Calls ---------------------------------------------------------------------------------------------------------------

STEPS = ("transform_inputs", "execute", "transform_outputs")


def backend_class(base: type, steps: dict[str, Any], calls: list[tuple[str, Any]]) -> type:
    def make(name: str, result: Any) -> Callable[[Any, Any], Any]:
        def step(_self: Any, data: Any) -> Any:
            calls.append((name, describe(data)))
            if isinstance(result, Exception):
                raise result
            return data if result == "same" else copy.deepcopy(result)

        step.__name__ = name
        return step

    return type("Backend", (base,), {name: make(name, result) for name, result in steps.items()})


def test_calls_run_the_same_steps_and_fail_alike() -> None:
    chooser = random.Random(5)
    ends: Counter[str] = Counter()
    results: list[Any] = ["same"] * 14
    results += [
        ValueError("no"),
        KeyError("k"),
        [],
        [{"y": 1}],
        {"y": 1},
        None,
        7,
        ({},),
        [{"y": 1}, {"y": 2}],
        [object()],
    ]
    batches: list[Any] = [[], [{"a": 1}], [{"a": 1}, {"a": {"b": 2}}], {"a": 1}, {}, None, 5, "text", ({"a": 1},), [3]]
    settings: list[dict[str, Any]] = [
        {},
        {"feature_names": ["a"]},
        {"feature_names": ["a.b"]},
        {"input_format": "passthrough", "verbose": True},
        {"input_format": "numpy", "feature_names": ["a"]},
        {"output_keys": ["y", "z"]},
        {"input_format": "numpy"},
        {"input_format": "nonsense"},
    ]
    for _ in range(3_000):
        steps = {name: chooser.choice(results) for name in STEPS if name == "execute" or chooser.random() < 0.6}
        if chooser.random() < 0.1:
            steps["initialize"] = chooser.choice([ValueError("no weights"), "same"])
        values, inputs, method = chooser.choice(settings), chooser.choice(batches), chooser.choice(["call", "check"])
        told: list[Any] = []
        for base in (packflow.InferenceBackend, InferenceBackend):
            calls: list[tuple[str, Any]] = []
            made = outcome_of(lambda base=base, steps=steps, calls=calls: build(base, steps, values, calls))  # noqa: B023
            if made[0] == "raised":
                told.append((made, calls))
                continue
            backend, data = made[1], copy.deepcopy(inputs)
            ended = outcome_of(backend if method == "call" else backend.check_io, data)
            measured = outcome_of(backend.get_metrics)
            told.append((((ended[0], describe(ended[1])), fields_of(measured)), calls))
        assert told[0] == told[1], (steps, values, inputs)
        last = told[1][0][0]
        ends[f"{method} {last[0]}" if isinstance(last, tuple) else "not made"] += 1
    assert (
        min(ends[end] for end in ("call returned", "call raised", "check returned", "check raised", "not made")) > 150
    )


def build(base: type, steps: dict[str, Any], values: dict[str, Any], calls: list[tuple[str, Any]]) -> Any:
    # initialize takes no data; the other steps do.
    others = {name: result for name, result in steps.items() if name != "initialize"}
    made = backend_class(base, others, calls)
    if "initialize" in steps:

        def initialize(_self: Any) -> None:
            calls.append(("initialize", None))
            if isinstance(steps["initialize"], Exception):
                raise steps["initialize"]

        made.initialize = initialize  # type: ignore[attr-defined]
    return made(**values)


def fields_of(measured: Outcome) -> Any:
    if measured[0] == "raised":
        return measured
    times = measured[1].execution_times.model_dump()
    total = sum(time for time in times.values() if time is not None)
    assert measured[1].total_execution_time == pytest.approx(total)
    return (
        measured[1].batch_size,
        [(name, time is None) for name, time in times.items()],
        list(measured[1].model_dump()),
    )


# Normalization -------------------------------------------------------------------------------------------------------


class Whole(int):
    """A subclass of a native type, which stays what it is."""


def native(value: Any) -> Any:
    """The one difference taken out: numpy's float64 and str_ are a float and a str, and packflow lets them be."""
    if isinstance(value, np.float64 | np.str_):
        return value.item()
    if type(value) is dict:
        return {key: native(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(native(item) for item in value)
    return value


def some_output(chooser: random.Random, depth: int) -> Any:
    if depth > 0 and chooser.random() < 0.5:
        size = chooser.choice([0, 1, 1, 2, 3])
        items = [some_output(chooser, depth - 1) for _ in range(size)]
        kind = chooser.choice(["list", "tuple", "dict", "ordered", "set", "objects"])
        if kind == "set":
            return set(range(size))
        if kind == "objects":
            array = np.empty(size, dtype=object)
            for index, item in enumerate(items):
                array[index] = item
            return array
        if kind in ("dict", "ordered"):
            keys = [chooser.choice(["a", "b", 1, None]) for _ in items]
            made = dict(zip(keys, items, strict=True))
            return OrderedDict(made) if kind == "ordered" else made
        return items if kind == "list" else tuple(items)
    shape = chooser.choice(
        [(), (0,), (1,), (3,), (2, 1), (1, 2), (2, 3), (2, 0), (0, 2), (2, 1, 2), (2, 2, 1), (1, 1, 1)]
    )
    dtype = chooser.choice(
        [
            "f8",
            "f4",
            "f2",
            "i8",
            "i4",
            "u1",
            "?",
            "c16",
            "U3",
            "S3",
            "M8[s]",
            "M8[ns]",
            "m8[s]",
            "O",
            "i4,f8",
            "V3",
            "g",
        ]
    )
    plain: list[Any] = [None, 1, 2.5, "s", True, Whole(3), float("inf"), np.float64(1), np.float32(2), np.int16(3)]
    plain += [
        np.bool_(True),
        np.str_("s"),
        np.datetime64("2020-01-01"),
        np.matrix("1 2; 3 4"),
        np.matrix("1; 2"),
        b"bytes",
        object,
        1j,
    ]
    plain += [frozenset({1}), range(2), np.ma.array([1, 2], mask=[False, True])]
    return chooser.choice([np.zeros(shape, dtype=dtype), np.ones(shape, dtype="f8"), chooser.choice(plain)])


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_outputs_are_normalized_as_packflow_does_but_for_numpys_own_floats_and_texts() -> None:
    chooser = random.Random(11)
    ends: Counter[str] = Counter()
    for _ in range(6_000):
        output = some_output(chooser, 3)
        for name, arguments in (("ensure_native_types", ()), ("ensure_valid_output", (chooser.choice(["output", 1]),))):
            expected = outcome_of(getattr(packflow.utils, name), output, *arguments)
            actual = outcome_of(getattr(streamproc.utils, name), output, *arguments)
            assert (actual[0], describe(native(actual[1]))) == (expected[0], describe(native(expected[1]))), output
            ends[f"{name} {actual[0]}"] += 1
            ends["differs only in numpy's types"] += describe(actual[1]) != describe(expected[1])
    assert min(ends.values()) > 300, ends


def test_the_helpers_for_records_are_packflows() -> None:
    generator = Generator(seed=3)
    ends: Counter[str] = Counter()
    for _ in range(2_000):
        generator.oddness = generator.random.choice([0.0, 0.2])
        delimiter = generator.random.choice([".", ":", "__"])
        record: Any = generator.record(KEYS)
        field, value, lists = generator.name(delimiter), generator.value(1), generator.chance(0.5)
        records = generator.random.choice([[record], [record, {"a": 1}], record])
        calls: list[tuple[str, tuple[Any, ...]]] = [
            ("check_delimiter_collisions", (record, delimiter)),
            ("flatten_dict", (record, delimiter, lists)),
            ("flatten_records", (records, delimiter, lists)),
            ("get_nested_field", (record, field, delimiter)),
            ("get_nested_field_direct", (record, field, delimiter)),
            ("set_nested_field_direct", (record, field, value, delimiter)),
            ("records_to_ndarray", (records, [field, "a"], None, delimiter)),
        ]
        for name, arguments in calls:
            told = []
            for module in (packflow.utils, streamproc.utils):
                given = copy_batch(list(arguments))
                ended = outcome_of(getattr(module, name), *given)
                # The arguments as well: one of these functions edits a record in place.
                told.append((ended[0], describe(ended[1]), describe(given)))
            assert told[0] == told[1], (name, arguments)
            ends[f"{name} {told[0][0]}"] += 1
    assert all(ends[f"{name} returned"] > 500 for name in streamproc.utils.__all__ if not name.startswith("ensure"))
    assert sum(count for end, count in ends.items() if end.endswith("raised")) > 300
