"""Non-negative least squares: against every choice of columns, and by what marks a solution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from streamproc.estimate.nnls import Vector, nnls

NUMBERS = st.floats(-10, 10).map(lambda it: round(it, 3))


def best_of_every_choice(matrix: Vector, target: Vector) -> float:
    """The least residual of all sets of columns whose least squares are not negative."""
    least = float(np.linalg.norm(target))
    for count in range(1, matrix.shape[1] + 1):
        for some in itertools.combinations(range(matrix.shape[1]), count):
            chosen = matrix[:, some]
            found = np.linalg.lstsq(chosen, target, rcond=None)[0]
            if (found >= 0).all():
                least = min(least, float(np.linalg.norm(chosen @ found - target)))
    return least


@st.composite
def problems(draw: st.DrawFn) -> tuple[Vector, Vector]:
    rows, columns = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    matrix = draw(arrays.arrays(np.float64, (rows, columns), elements=NUMBERS))
    return matrix, draw(arrays.arrays(np.float64, rows, elements=NUMBERS))


@given(problems())
@settings(max_examples=1_000)
def test_no_choice_of_columns_does_better(problem: tuple[Vector, Vector]) -> None:
    matrix, target = problem
    found = nnls(matrix, target)
    assert (found >= 0).all()
    assert np.linalg.norm(matrix @ found - target) <= best_of_every_choice(matrix, target) + 1e-6


@given(problems())
@settings(max_examples=500)
def test_the_gradient_marks_a_solution(problem: tuple[Vector, Vector]) -> None:
    matrix, target = problem
    found = nnls(matrix, target)
    gradient = matrix.T @ (target - matrix @ found)
    scale = 1 + float(np.abs(matrix).max()) ** 2 + float(np.abs(target).max()) ** 2
    assert (gradient <= 1e-6 * scale).all(), "more of a column would help"
    assert (np.abs(gradient[found > 0]) <= 1e-6 * scale).all(), "a column has too much or too little"


@given(arrays.arrays(np.float64, 3, elements=st.floats(0, 100)), st.integers(0, 2**32 - 1))
def test_what_made_the_target_is_found_again_whatever_the_units(truth: Vector, seed: int) -> None:
    units = np.array([1.0, 1e3, 1e9])
    matrix = np.random.default_rng(seed).uniform(0.1, 1.0, (12, 3))
    assert nnls(matrix * units, matrix @ truth) * units == pytest.approx(truth, rel=1e-6, abs=1e-6)


def test_columns_of_nothing_get_nothing() -> None:
    assert nnls(np.zeros((3, 2)), np.ones(3)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("matrix", "target"),
    [(np.ones((2, 2)), np.ones(3)), (np.ones(2), np.ones(2)), (np.array([[np.nan]]), np.ones(1))],
)
def test_what_is_no_problem_is_refused(matrix: Vector, target: Vector) -> None:
    with pytest.raises(ValueError, match=r"finite|shape"):
        nnls(matrix, target)
