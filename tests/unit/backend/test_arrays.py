from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.backend.arrays import _numbers, to_array


def assert_same(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.flags.writeable
    assert actual.flags.c_contiguous
    if actual.dtype == object:
        assert [list(map(type, row)) for row in actual.tolist()] == [list(map(type, row)) for row in expected.tolist()]
        assert repr(actual.tolist()) == repr(expected.tolist())
    else:
        assert actual.tobytes() == expected.tobytes()


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(1, 5).flatmap(lambda width: st.lists(st.tuples(*[st.floats()] * width), min_size=1, max_size=6)))
def test_rows_of_floats_are_the_same_to_the_bit(rows: list[Any]) -> None:
    assert _numbers(rows, (float,) * len(rows[0])) is not None
    assert_same(to_array(rows), np.array(rows))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from([int, float]), min_size=1, max_size=6), st.data())
def test_columns_of_integers_and_of_floats_are_the_same_to_the_bit(kinds: list[type], data: st.DataObject) -> None:
    small = st.integers(-(2**31), 2**31 - 1)
    row = st.tuples(*[small if kind is int else st.floats() for kind in kinds])
    rows: list[Any] = data.draw(st.lists(row, min_size=1, max_size=6))
    assert _numbers(rows, tuple(kinds)) is not None
    assert_same(to_array(rows), np.array(rows))


numbers = st.integers(-(2**66), 2**66) | st.floats() | st.booleans() | st.integers(-9, 9)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.tuples(*[numbers] * width), min_size=1, max_size=5)))
def test_numbers_of_any_kind_and_size_become_what_numpy_makes_of_them(rows: list[Any]) -> None:
    assert_same(to_array(rows), np.array(rows))


STRANGERS = [
    1,
    True,
    None,
    "1.5",
    2**70,
    np.float64(1),
    np.float32(1),
    Decimal(1),
    Fraction(1),
    1j,
    b"12345678",
    object(),
]


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (2, 1)])
def test_one_value_of_another_type_decides_the_dtype_as_numpy_infers_it(stranger: Any, place: tuple[int, int]) -> None:
    rows: list[Any] = [[0.5, math.inf], [-0.0, math.nan], [1e-310, 2.0]]
    rows[place[0]][place[1]] = stranger
    assert _numbers(rows, (float, float)) is None
    assert_same(to_array(rows), np.array(rows))


def test_values_whose_lengths_add_up_to_those_of_floats_are_told_apart() -> None:
    # As long as two floats, when written: two texts of four bytes; and an integer with a text.
    for rows in ([[0.5, 0.5], ["abcd", "abcd"]], [[0.5, 0.5], [7, b"12345678"]], [[0.5, 0.5], [(0.5,), ()]]):
        try:
            expected = np.array(rows)
        except ValueError:
            with pytest.raises(ValueError, match="inhomogeneous"):
                to_array(rows)  # type: ignore[arg-type]
        else:
            assert_same(to_array(rows), expected)  # type: ignore[arg-type]


def test_no_rows_are_an_array_without_rows() -> None:
    assert_same(to_array([]), np.array([]))
