"""The fit: coefficients that made the data are found again, terms that are not there are left out."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.estimate.fit import Fit, Seen, best_size, fit, kappa, mean_error
from streamproc.estimate.measure import by_memory, by_time
from streamproc.runtime.cost import CostModel

SIZES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (16, 40, 100, 250, 600, 1_500)


def shapes(
    time_ms: Callable[[int, int], float],
    peak_bytes: Callable[[int, int], float] = lambda *_: 1.0,
    *,
    noise: float = 0.0,
    lengths: tuple[int, ...] = LENGTHS,
    seed: int = 1,
) -> list[Seen]:
    rng = random.Random(seed)
    return [
        Seen(size, length, time_ms(size, length) * rng.lognormvariate(0, noise), peak_bytes(size, length))
        for length in lengths
        for size in SIZES
    ]


@pytest.mark.parametrize(
    "truth",
    [(5.0, 0.02, 0.002, 2e-6), (5.0, 0.0, 0.002, 0.0), (5.0, 0.0, 0.0, 2e-6), (0.0, 0.3, 0.01, 0.0), (4.0, 0.5, 0, 0)],
)
def test_the_coefficients_are_found_again(truth: tuple[float, float, float, float]) -> None:
    model = Fit(truth, 0.0)
    found = fit(shapes(model.predict), by_time)
    assert found.coefficients == pytest.approx(truth, rel=1e-6, abs=1e-12)
    assert found.error < 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_terms_that_only_noise_would_need_are_left_out(seed: int) -> None:
    seen = shapes(lambda size, length: 5 + size * 0.01 * length, noise=0.03, seed=seed)
    found = fit(seen, by_time)
    assert found.terms == ("1", "n·L")
    assert found.coefficients[2] == pytest.approx(0.01, rel=0.05)


def test_a_square_that_is_there_is_kept_in_spite_of_noise() -> None:
    seen = shapes(lambda size, length: 5 + size * (0.002 * length + 4e-6 * length**2), noise=0.05)
    found = fit(seen, by_time)
    assert "n·L²" in found.terms
    assert found.predict(10, 3_000) == pytest.approx(5 + 10 * (6 + 36), rel=0.15)


def test_of_one_length_only_the_size_counts() -> None:
    found = fit(shapes(lambda size, _: 3 + 2 * size, lengths=(1,)), by_time)
    assert found.terms == ("1", "n")


def test_of_two_lengths_no_square_is_made_out() -> None:
    found = fit(shapes(lambda size, length: 3 + 2e-4 * size * length**2, lengths=(10, 100)), by_time)
    assert "n·L²" not in found.terms


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 500), st.floats(0.01, 1e4)), min_size=1, max_size=40))
def test_whatever_was_seen_no_coefficient_is_negative_and_the_model_can_be_made(
    seen: list[tuple[int, int, float]],
) -> None:
    found = fit([Seen(size, length, value, value) for size, length, value in seen], by_time)
    assert all(it >= 0 for it in found.coefficients)
    assert found.predict(1, 1) >= 0
    a, b, c, d = found.coefficients
    CostModel(a, b, c, d)


def test_without_anything_seen_there_is_no_fit() -> None:
    with pytest.raises(ValueError, match="measured"):
        fit([], by_time)
    with pytest.raises(ValueError, match="above zero"):
        fit([Seen(1, 1, 0.0, 1.0)], by_time)


def test_kappa_covers_the_shape_that_needed_most_over_prediction() -> None:
    memory = Fit((100.0, 0.0, 1.0, 0.0), 0.0)
    seen = [Seen(1, 100, 1, 150.0), Seen(2, 100, 1, 330.0), Seen(4, 100, 1, 500.0)]
    assert kappa(memory, seen) == pytest.approx(1.1)
    assert kappa(memory, seen[:1]) == 1.0
    assert mean_error(memory, seen, by_memory) == pytest.approx((50 / 150 + 30 / 330 + 0) / 3)


def test_the_best_size_is_the_least_of_those_that_do_about_as_much() -> None:
    seen = [Seen(1, 10, 1.0, 1), Seen(2, 10, 1.0, 1), Seen(4, 10, 1.99, 1), Seen(8, 10, 5.0, 1)]
    assert best_size(seen) == 2
    assert best_size(seen[:1]) == 1
