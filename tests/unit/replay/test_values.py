"""Values against each other: what is equal, close or changed, and where; exchanging the sides changes nothing else."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.replay.values import ABSENT, Change, Pattern, Rules, Tolerance, compare, generic, text_of

EXACT = Rules(Tolerance())

numbers = st.floats() | st.integers(-(2**63), 2**64 - 1)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=5)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('ab.[]"é', max_size=3), inner, max_size=4),
    max_leaves=20,
)


def paths(changes: list[Change]) -> list[str]:
    return [it.path for it in changes]


def one(baseline: Any, candidate: Any, rules: Rules = EXACT) -> Change:
    (change,) = compare(baseline, candidate, rules)
    return change


@given(documents)
def test_a_value_equals_its_copy(document: Any) -> None:
    assert compare(document, copy.deepcopy(document), EXACT) == []


@given(documents, documents, st.floats(0, 10), st.floats(0, 1))
def test_exchanging_the_sides_exchanges_the_sides_of_every_change_and_nothing_else(
    first: Any, second: Any, absolute: float, relative: float
) -> None:
    rules = Rules(Tolerance(absolute, relative))
    there = {it.path: it for it in compare(first, second, rules)}
    back = {it.path: it for it in compare(second, first, rules)}
    assert there.keys() == back.keys()
    for path, change in there.items():
        other = back[path]
        assert change.is_close == other.is_close
        assert (change.size, change.numbers, change.worst) == (other.size, other.numbers, other.worst)
        assert repr((change.baseline, change.candidate)) == repr((other.candidate, other.baseline))


@given(documents, documents)
def test_nothing_differs_exactly_where_python_finds_no_difference(first: Any, second: Any) -> None:
    assert (compare(first, second, EXACT) == []) == _same(first, second)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, float) and isinstance(second, float) and math.isnan(first) and math.isnan(second):
        return True
    return bool(first == second)


@given(st.floats(), st.floats(), st.floats(0, 1e6), st.floats(0, 1))
def test_a_tolerance_is_the_same_both_ways(first: float, second: float, absolute: float, relative: float) -> None:
    tolerance = Tolerance(absolute, relative)
    assert tolerance.covers(first, second) == tolerance.covers(second, first)


@given(
    st.lists(st.tuples(st.floats(width=16), st.floats(width=16)), min_size=16, max_size=40),
    st.floats(0, 10),
    st.floats(0, 1),
)
def test_lists_of_floats_are_compared_as_their_numbers_are_one_by_one(
    pairs: list[tuple[float, float]], absolute: float, relative: float
) -> None:
    rules = Rules(Tolerance(absolute, relative))
    first, second = [list(it) for it in zip(*pairs, strict=True)]
    # A null at the end of both lists: no list of floats any more, and nothing that differs.
    slowly = compare([*first, None], [*second, None], rules)
    quickly = compare(first, second, rules)
    assert len(quickly) == len(slowly)
    for fast, slow in zip(quickly, slowly, strict=True):
        assert (fast.path, fast.is_close, fast.numbers) == (slow.path, slow.is_close, slow.numbers)
        assert (fast.size is None) == (slow.size is None)
        assert fast.size is None or fast.size == pytest.approx(slow.size)
        assert fast.sizes == pytest.approx(slow.sizes)
        assert abs(fast.baseline - fast.candidate) == pytest.approx(abs(slow.baseline - slow.candidate), nan_ok=True)


@given(st.lists(st.integers(0, 10**6) | st.text(max_size=4).filter(lambda it: it != "*"), max_size=4))
def test_a_path_that_is_written_is_a_pattern_of_itself(steps: list[Any]) -> None:
    path = tuple(steps)
    assert Pattern.parse(text_of(path)).steps == path


def test_numbers_are_compared_by_value_and_truth_values_are_none() -> None:
    assert compare({"a": 1, "b": math.nan}, {"a": 1.0, "b": math.nan}, EXACT) == []
    assert paths(compare({"a": 1}, {"a": True}, EXACT)) == ["a"]
    assert paths(compare({"a": math.nan}, {"a": 1.0}, EXACT)) == ["a"]
    assert paths(compare({"a": math.inf}, {"a": 1e308}, Rules(Tolerance(0, 1)))) == ["a"]


def test_by_default_floats_are_close_where_batching_explains_it_and_integers_are_not() -> None:
    assert one({"score": 0.1234567}, {"score": 0.1234568}, Rules()).is_close
    assert not one({"score": 0.123}, {"score": 0.124}, Rules()).is_close
    assert not one({"id": 10_000_000}, {"id": 10_000_001}, Rules()).is_close


def test_the_longest_pattern_has_its_say_on_integers_too() -> None:
    fields = {Pattern.parse(text): Tolerance(number) for text, number in (("a", 5), ("a.b", 1), ("c[*]", 1))}
    rules = Rules(Tolerance(), fields)
    found = {it.worst: it.is_close for it in compare({"a": {"b": 1, "c": 1}}, {"a": {"b": 4, "c": 4}}, rules)}
    assert found == {"a.b": False, "a.c": True}
    assert one({"c": [1]}, {"c": [2]}, rules).is_close


def test_an_ignored_field_is_passed_over_with_all_that_is_in_it() -> None:
    rules = Rules(Tolerance(), {}, [Pattern.parse("seen"), Pattern.parse("all[*].at")])
    before = {"seen": {"at": 1}, "all": [{"at": 1, "n": 1}]}
    after = {"seen": [], "all": [{"at": 2, "n": 2}]}
    assert paths(compare(before, after, rules)) == ["all[*].n"]
    assert compare({"seen": 1}, {}, rules) == []


def test_what_is_absent_is_told_from_a_null() -> None:
    change = one({"a": None}, {})
    assert (change.baseline, change.candidate) == (None, ABSENT)


def test_the_places_of_a_list_are_one_field_shown_by_the_worst_of_them() -> None:
    change = one({"s": [1.0, 2.0, 3.0]}, {"s": [1.5, 2.0, 1.0]})
    assert (change.path, change.worst, change.baseline, change.candidate) == ("s[*]", "s[2]", 3.0, 1.0)
    assert (change.size, change.sizes, change.numbers) == (2.0, 2.5, 2)


def test_lists_of_different_lengths_have_changed_as_a_whole() -> None:
    assert paths(compare({"s": [1, 2]}, {"s": [1, 3, 3]}, EXACT)) == ["s", "s[*]"]


def test_the_order_of_a_list_matters_and_that_of_keys_does_not() -> None:
    assert compare({"a": 1, "b": 2}, {"b": 2, "a": 1}, EXACT) == []
    assert paths(compare([1, 2], [2, 1], EXACT)) == ["[*]"]


def test_values_are_compared_however_deep_they_are() -> None:
    deep: Any = 1
    other: Any = 2
    for _ in range(5_000):
        deep, other = [deep], [other]
    assert one(deep, other).worst == "[0]" * 5_000


def test_names_of_fields_that_are_no_plain_names_are_quoted() -> None:
    assert text_of(("a.b", 0, "c")) == '["a.b"][0].c'
    assert generic(("a", 3, "b")) == "a[*].b"
    assert text_of(()) == "$"
    assert Pattern.parse("*.a[*]").covers(("x", "a", 7, "below"))
    assert Pattern.parse("$.a").covers(("a",))


@pytest.mark.parametrize("text", ["", "a..b", "a[", "a[x]", ".a", "a.", 'a["b]', "a b]"])
def test_what_is_no_field_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="field"):
        Pattern.parse(text)


def test_a_tolerance_is_a_number_or_a_share() -> None:
    assert Tolerance.parse("0.01") == Tolerance(absolute=0.01)
    assert Tolerance.parse("1%") == Tolerance(relative=0.01)
    for text in ("x", "-1", "nan", "inf", ""):
        with pytest.raises(ValueError, match="is no tolerance"):
            Tolerance.parse(text)
