from __future__ import annotations

import copy
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.backend import BackendConfig
from streamproc.backend.plans import FlatPlan, FlattenPlan, NestedPlan, ReferencePlan, choose_plan
from streamproc.backend.preprocessors import get_preprocessor
from streamproc.backend.shapes import Flattener, PlainRecords
from streamproc.errors import PreprocessorInitError, PreprocessorRuntimeError, UnknownPreprocessorError


def process(records: Any, **config: Any) -> Any:
    return get_preprocessor(BackendConfig(**config))(records)


@pytest.mark.parametrize("config", [{"input_format": "passthrough", "feature_names": ["a"]}, {"flatten_lists": True}])
def test_what_needs_no_preprocessing_is_the_very_same_object(config: dict[str, Any]) -> None:
    records = [{"a": 1, "b": 2}]
    assert process(records, **config) is records


def test_renamed_fields_come_first_and_features_follow_in_their_order() -> None:
    records = [{"a": 1, "b": 2, "c": 3, "d": 4}]
    kept = process(records, rename_fields={"d": "y", "b": "x"}, feature_names=["c", "x", "a"])
    assert [list(record.items()) for record in kept] == [[("y", 4), ("x", 2), ("c", 3), ("a", 1)]]


def test_without_features_the_whole_record_follows_the_renamed_fields() -> None:
    assert list(process([{"a": 1, "b": None}], rename_fields={"a": "x"})[0].items()) == [
        ("x", 1),
        ("a", 1),
        ("b", None),
    ]


def test_missing_and_none_are_left_out() -> None:
    records: list[dict[str, Any]] = [{"a": None, "b": 0}, {"b": False}, {"a": ""}]
    assert process(records, feature_names=["a", "b"]) == [{"b": 0}, {"b": False}, {"a": ""}]


def test_a_feature_that_its_rename_does_not_find_is_read_under_its_own_name() -> None:
    records = [{"old": 1, "new": 2}, {"new": 3}, {"old": None, "new": 4}]
    kept = process(records, rename_fields={"old": "new"}, feature_names=["new"])
    assert kept == [{"new": 1}, {"new": 3}, {"new": 4}]


def test_nested_names_keep_the_structure() -> None:
    records = [{"foo": {"bar": 0, "baz": 1}, "x": {"y": {"z": 5}}}]
    assert process(records, feature_names=["foo.bar"]) == [{"foo": {"bar": 0}}]
    assert process(records, rename_fields={"x.y.z": "p.q"}, feature_names=["foo.baz"]) == [
        {"p": {"q": 5}, "foo": {"baz": 1}}
    ]


def test_a_key_with_the_delimiter_is_a_collision_that_names_its_path() -> None:
    records = [{"foo": {"bar": 0}}, {"foo": {"b.r": {"c.d": 0}}}]
    with pytest.raises(PreprocessorRuntimeError, match=r"foo\.b\.r.*foo\.b\.r\.c\.d"):
        process(records, feature_names=["foo.bar"])
    assert process(records, feature_names=["foo.bar"], nested_field_delimiter=":") == [{}, {}]


def test_ignored_collisions_read_the_literal_key_first() -> None:
    records = [{"a.b": 1, "a": {"b": 2}}]
    kept = process(records, feature_names=["a.b"], ignore_delimiter_collisions=True)
    assert kept == [{"a": {"b": 1}}]


def test_flattening_keeps_empty_containers_and_renames_by_flat_names() -> None:
    records = [{"a": {"b": 1, "c": {}}, "d": [], "e": [7, {"f": 8}]}]
    assert process(records, flatten_nested_inputs=True) == [{"a.b": 1, "a.c": {}, "d": [], "e": [7, {"f": 8}]}]
    assert process(records, flatten_nested_inputs=True, flatten_lists=True, rename_fields={"e.1.f": "f"}) == [
        {"f": 8, "a.b": 1, "a.c": {}, "d": [], "e.0": 7, "e.1.f": 8}
    ]


def test_two_values_with_one_flat_name_are_refused_whether_or_not_the_keys_are_known() -> None:
    preprocess = get_preprocessor(BackendConfig(flatten_nested_inputs=True))
    record = {"a": {"b": 1}, "a.b": 2}
    for _ in range(2):
        with pytest.raises(PreprocessorRuntimeError, match=r"'a\.b'"):
            preprocess([record])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_mapping_of_another_kind_is_flattened_too_where_a_leaf_was_before(depth: int) -> None:
    def record(value: Any, levels: int = depth) -> dict[str, Any]:
        return {"a": value if levels == 1 else record(value, levels - 1)}

    preprocess = get_preprocessor(BackendConfig(flatten_nested_inputs=True))
    name = ".".join("a" * depth)
    assert preprocess([record(1), record(2)]) == [{name: 1}, {name: 2}]
    assert preprocess([record(MappingProxyType({"b": 3})), record({"b": 4})]) == [{f"{name}.b": 3}, {f"{name}.b": 4}]
    assert preprocess([record({}), record(MappingProxyType({}))]) == [{name: {}}, {}]


def test_an_array_has_its_columns_in_the_order_of_the_features() -> None:
    array = process(
        [{"a": 1, "n": {"b": 2}}, {"a": 3, "n": {"b": 4}}], input_format="numpy", feature_names=["n.b", "a"]
    )
    assert array.tolist() == [[2, 1], [4, 3]]
    assert array.dtype == np.int64


def test_an_array_reads_a_renamed_feature_from_its_old_name() -> None:
    records = [{"old": 1.5}]
    assert process(records, input_format="numpy", feature_names=["new"], rename_fields={"old": "new"}).tolist() == [
        [1.5]
    ]


def test_a_missing_value_is_none_in_an_array_of_objects() -> None:
    array = process([{"a": 1}, {}], input_format="numpy", feature_names=["a"])
    assert array.dtype == object
    assert array.tolist() == [[1], [None]]


def test_an_array_needs_features_and_dicts() -> None:
    with pytest.raises(PreprocessorInitError, match="feature_names"):
        process([], input_format="numpy")
    with pytest.raises(PreprocessorRuntimeError, match="index 1"):
        process([{"a": 1}, [2]], input_format="numpy", feature_names=["a"])


def test_a_format_as_text_is_taken_and_an_unknown_one_refused() -> None:
    class Loose(BackendConfig):
        input_format: Any = "numpy"

    assert get_preprocessor(Loose(feature_names=["a"]))([{"a": 1}]).tolist() == [[1]]
    with pytest.raises(UnknownPreprocessorError, match=r"'parquet'.*passthrough, records, numpy"):
        get_preprocessor(Loose(input_format="parquet"))


def test_each_kind_of_configuration_has_its_plan() -> None:
    def plan(**config: Any) -> type:
        return type(choose_plan(BackendConfig(**config)))

    assert plan(feature_names=["a"], rename_fields={"a": "b"}) is FlatPlan
    assert plan(feature_names=["a.b"]) is NestedPlan
    assert plan(rename_fields={"a": "b.c"}) is NestedPlan
    assert plan(flatten_nested_inputs=True, feature_names=["a.b"]) is FlattenPlan
    assert plan(feature_names=["a"], nested_field_delimiter="") is ReferencePlan
    assert plan(rename_fields={1: "a"}) is ReferencePlan


def test_what_is_remembered_of_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamproc.backend.shapes.MAX_REMEMBERED", 50)
    flattener, plain = Flattener("."), PlainRecords(".")
    for number in range(200):
        record = {f"user{number}": {f"key{number}": number}}
        assert flattener.flatten_all([record]) == [{f"user{number}.key{number}": number}]
        assert plain.has(record)
        assert not plain.has({f"user{number}": {f"key.{number}": number}})
    assert len(plain._known) <= 50  # what is kept is the point here
    assert len(flattener._root.names) <= 50


@pytest.mark.parametrize(
    ("record", "delimiter", "expected"),
    [
        ({"a": {"b": [1, {"c.d": 1}]}}, ".", True),
        ({"": {"": 1}}, ".", True),
        ({"a.b": 1}, ".", False),
        ({"a": {"b.c": 1}}, ".", False),
        ({1: 2}, ".", False),
        ({"a": {1, 2}}, ".", False),
        ({"a_": {"b": 1}}, "__", False),
        ({"a": {"_b": 1}}, "__", False),
        ({"a": {"": 1}}, "__", False),
        ({"a_b": {"c_d": 1}}, "__", True),
        ([], ".", False),
    ],
)
def test_a_record_is_plain_if_a_nested_name_can_mean_one_thing_only(
    record: Any, delimiter: str, expected: bool
) -> None:
    assert PlainRecords(delimiter).has(record) is expected


keys = st.sampled_from(["a", "b", "c", "a.b", "b.c", "", "x"])
scalars = st.none() | st.integers(0, 3) | st.sampled_from(["", "t"]) | st.booleans()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)
records_ = st.lists(st.dictionaries(keys, values, max_size=5), max_size=4)
names = st.sampled_from(["a", "b", "c", "x", "y", "a.b", "b.c", "a.b.c", "x.y", ".", "a."])
configurations = st.fixed_dictionaries(
    {
        "rename_fields": st.dictionaries(names, names, max_size=3),
        "feature_names": st.lists(names, max_size=4),
        "flatten_nested_inputs": st.booleans(),
        "flatten_lists": st.booleans(),
        "ignore_delimiter_collisions": st.booleans(),
        "nested_field_delimiter": st.sampled_from([".", "..", ":"]),
    }
)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(configurations, st.lists(records_, min_size=2, max_size=3))
def test_every_plan_gives_what_the_reference_gives(config: dict[str, Any], batches: list[Any]) -> None:
    model = BackendConfig(**config)
    plan, reference = choose_plan(model), ReferencePlan(model)
    for batch in batches:
        before = copy.deepcopy(batch)
        told = []
        for each in (plan, reference):
            try:
                told.append(repr(each(batch)))
            except (PreprocessorRuntimeError, ValueError) as error:
                told.append(repr(error))
        assert told[0] == told[1]
        assert batch == before


HOSTILE = ["'", '"', "\\", "\n", "{", "}", "v0", "r", "None", "'] + [", "\ud800", "é", "class", "%s", "#", "\x00"]
any_key = st.text(max_size=4) | st.sampled_from(HOSTILE)
flat_records = st.lists(st.dictionaries(any_key, scalars, max_size=5), max_size=4)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(flat_records, st.data())
def test_names_are_data_whatever_is_in_them(batch: list[dict[str, Any]], data: st.DataObject) -> None:
    known = sorted({key for record in batch for key in record}) or ["a"]
    name = st.sampled_from(known) | any_key
    config = {
        "rename_fields": data.draw(st.dictionaries(name, any_key, max_size=3)),
        "feature_names": data.draw(st.lists(name, max_size=4)),
        "nested_field_delimiter": data.draw(st.sampled_from([".", "'", "\\", "]["])),
        "flatten_nested_inputs": data.draw(st.booleans()),
    }
    model = BackendConfig(**config)
    nested = [{"in": record, **record} for record in batch]
    for each in (batch, nested):
        told = []
        for plan in (choose_plan(model), ReferencePlan(model)):
            try:
                told.append(repr(plan(each)))
            except (PreprocessorRuntimeError, ValueError) as error:
                told.append(repr(error))
        assert told[0] == told[1]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(records_, st.sampled_from([".", "..", ":"]))
def test_a_batch_is_plain_where_each_of_its_records_is(batch: list[Any], delimiter: str) -> None:
    batch_at_once, one_by_one = PlainRecords(delimiter), PlainRecords(delimiter)
    for _ in range(2):
        assert batch_at_once.has_all(batch) == all(one_by_one.has(record) for record in batch)


def test_a_batch_with_something_else_than_records_in_it_is_not_plain() -> None:
    assert not PlainRecords(".").has_all([{"a": 1}, [1]])
    assert not PlainRecords(".").has_all([{"a": {"b": OrderedDict()}}])
