"""The cost model, the limits that follow from it, and its correction while batches run."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from streamproc.runtime.cost import CostModel
from streamproc.runtime.limits import Limits
from streamproc.runtime.online_cost import GUESS, TRUSTED_FROM, OnlineCost

coefficients = st.floats(0, 1e3, allow_subnormal=False)
TRUE = CostModel(alpha_ms=5.0, beta_ms=0.02, gamma_ms=0.002, delta_ms=2e-6)


def models() -> st.SearchStrategy[CostModel]:
    return st.builds(CostModel, st.floats(0.1, 10), *[coefficients] * 7)


def test_time_and_memory_are_the_formulas() -> None:
    it = CostModel(5.0, 0.02, 0.002, 0.000002, 1_000, 10, 2, 0.5)
    assert it.record_ms(100) == pytest.approx(0.02 + 0.2 + 0.02)
    assert it.time_ms(10, 100) == pytest.approx(5 + 10 * 0.24)
    assert it.record_bytes(100) == 10 + 200 + 5_000
    assert it.memory_bytes(3, 100) == 1_000 + 3 * 5_210


def test_a_negative_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match="gamma_ms is -1"):
        CostModel(1.0, gamma_ms=-1)


def test_a_coefficient_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="d_bytes is nan"):
        CostModel(1.0, d_bytes=float("nan"))


def test_a_batch_takes_some_time() -> None:
    with pytest.raises(ValueError, match="no time at all"):
        CostModel(0.0, b_bytes=1)


def test_at_the_knee_a_batchs_own_cost_is_five_percent_of_the_rest() -> None:
    # h(1000) is 4.02 ms; 5 ms / 4.02 ms * 19 is 23.6 records.
    assert TRUE.short_of_knee_ms(23, 1_000) == pytest.approx(5 * 19 - 23 * 4.02)
    assert [TRUE.short_of_knee_ms(n, 1_000) > 0 for n in (23, 24)] == [True, False]
    assert TRUE.short_of_knee_ms(2, 1_000, epsilon=0.5) < 0


@given(models(), st.integers(1, 50), st.integers(0, 5_000), st.integers(0, 5_000), st.integers(1, 50))
def test_every_part_of_a_batch_costs_no_more(model: CostModel, n: int, length: int, shorter: int, fewer: int) -> None:
    assume(shorter <= length and fewer <= n)
    assert model.time_ms(fewer, shorter) <= model.time_ms(n, length) * (1 + 1e-12)
    assert model.memory_bytes(fewer, shorter) <= model.memory_bytes(n, length) * (1 + 1e-12)


@given(
    model=models(),
    max_size=st.integers(1, 100),
    max_padded=st.one_of(st.none(), st.integers(1, 10_000)),
    budget=st.floats(1, 1e7),
    kappa=st.floats(1, 3),
    length=st.integers(0, 5_000),
    longer=st.integers(0, 5_000),
)
def test_n_max_is_the_most_that_fits_and_falls_with_length(
    *,
    model: CostModel,
    max_size: int,
    max_padded: int | None,
    budget: float,
    kappa: float,
    length: int,
    longer: int,
) -> None:
    cost = OnlineCost(model, kappa=kappa)
    limits = Limits(max_size, 100, max_padded=max_padded, cost=cost, memory_budget_bytes=budget)
    most = limits.n_max(length)

    def fits(n: int, slack: float) -> bool:
        return (
            n <= max_size
            and (max_padded is None or n * length <= max_padded)
            and cost.memory_bytes(n, length) <= budget * slack
        )

    assert most == 0 or fits(most, 1 + 1e-9)
    assert not fits(most + 1, 1 - 1e-9)
    assert limits.n_max(max(length, longer)) <= most
    assert limits.fits_alone(length, 100) == (most > 0)
    assert not limits.fits_alone(length, 101)


def test_the_limit_that_binds_has_a_name() -> None:
    cost = OnlineCost(CostModel(1.0, c_bytes=1))
    limits = Limits(10, 100, max_padded=1_000, cost=cost, memory_budget_bytes=500)
    assert [limits.rule(length) for length in (1, 60)] == ["size", "memory"]
    assert Limits(10, 100, max_padded=1_000).rule(200) == "padding"


def test_a_budget_without_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a cost model"):
        Limits(1, 1, memory_budget_bytes=5)


def shapes(rng: random.Random) -> tuple[int, int]:
    return rng.randint(1, 64), int(min(2_048, rng.lognormvariate(4.2, 1)))


def test_times_seen_correct_a_guess() -> None:
    rng = random.Random(1)
    it = OnlineCost(GUESS)
    for _ in range(600):
        n, length = shapes(rng)
        it.observe_time(n, length, TRUE.time_ms(n, length) * rng.lognormvariate(0, 0.03))
    errors = [
        abs(it.model.time_ms(n, length) / TRUE.time_ms(n, length) - 1)
        for n, length in (shapes(rng) for _ in range(200))
    ]
    assert sum(errors) / len(errors) < 0.05


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_guess_learns_from_a_few_batches_how_long_they_take_on_any_machine(scale: float) -> None:
    """Only how the guess's coefficients stand to each other counts: a batch may take any time."""
    rng = random.Random(3)
    true = CostModel(alpha_ms=4.0 * scale, gamma_ms=0.2 * scale)
    it = OnlineCost()
    it.observe_time(8, 60, true.time_ms(8, 60))
    assert it.model.time_ms(8, 60) == pytest.approx(true.time_ms(8, 60))
    for _ in range(10):
        n, length = shapes(rng)
        it.observe_time(n, length, true.time_ms(n, length))
    saved, each = it.model.alpha_ms, it.model.record_ms(64)
    assert saved < 2 * each, "here a batch that is saved is worth little padding"


def test_times_that_change_are_followed() -> None:
    rng = random.Random(2)
    it = OnlineCost(TRUE, calibrated=True)
    for _ in range(600):
        n, length = shapes(rng)
        it.observe_time(n, length, 3 * TRUE.time_ms(n, length))
    assert it.model.time_ms(32, 100) == pytest.approx(3 * TRUE.time_ms(32, 100), rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 5_000), st.floats(1e-3, 1e5)), max_size=60))
def test_whatever_is_seen_no_coefficient_gets_negative(seen: list[tuple[int, int, float]]) -> None:
    it = OnlineCost(CostModel(1.0, 0.1, 0.01, 0))
    for n, length, ms in seen:
        it.observe_time(n, length, ms)
        model = it.model
        assert min(model.alpha_ms, model.beta_ms, model.gamma_ms) > 0
        assert model.delta_ms == 0, "a term that was left out stays out"


def test_the_same_shape_for_ever_leaves_the_others_sensible() -> None:
    it = OnlineCost(TRUE, calibrated=True)
    for _ in range(5_000):
        it.observe_time(10, 100, 2 * TRUE.time_ms(10, 100))
    assert it.model.time_ms(10, 100) == pytest.approx(2 * TRUE.time_ms(10, 100), rel=0.01)
    assert 1 / 4 < it.model.time_ms(40, 400) / TRUE.time_ms(40, 400) < 4


def test_a_time_that_is_none_changes_nothing() -> None:
    it = OnlineCost(TRUE)
    for ms in (0.0, -1.0, float("nan"), float("inf")):
        it.observe_time(1, 1, ms)
    assert it.model is TRUE


def test_a_guess_is_trusted_after_some_batches_and_a_calibration_at_once() -> None:
    it = OnlineCost()
    for _ in range(TRUSTED_FROM - 1):
        it.observe_time(1, 1, 1.0)
    assert not it.trusted
    it.observe_time(1, 1, 1.0)
    assert it.trusted
    assert OnlineCost(TRUE, calibrated=True).trusted


def test_nearly_all_batches_stay_within_the_late_time() -> None:
    rng = random.Random(3)
    it = OnlineCost(TRUE, calibrated=True)
    late = 0
    for number in range(6_000):
        n, length = shapes(rng)
        ms = TRUE.time_ms(n, length) * rng.lognormvariate(0, 0.2)
        late += number >= 1_000 and ms > it.late_ms(n, length)
        it.observe_time(n, length, ms)
    assert 0.003 < late / 5_000 < 0.03


MEMORY = CostModel(1.0, a_bytes=1_000, c_bytes=10)


def test_kappa_rises_at_once_to_what_was_seen() -> None:
    it = OnlineCost(MEMORY)
    it.observe_memory(2_000, 3_000)
    assert it.kappa == 1.5
    assert it.memory_bytes(10, 10) == 3_000


def test_kappa_comes_back_slowly_and_never_below_the_calibrations() -> None:
    it = OnlineCost(MEMORY, kappa=1.1)
    it.observe_memory(2_000, 4_000)
    for _ in range(6_931):
        it.observe_memory(2_000, 1.0)
    assert it.kappa == pytest.approx(1.1 + 0.9 / 2, rel=0.001)
    for _ in range(200_000):
        it.observe_memory(2_000, 1.0)
    assert it.kappa == pytest.approx(1.1)
    assert it.kappa >= 1.1


@given(
    model=st.one_of(st.none(), models()),
    size=st.integers(2, 100),
    length=st.integers(0, 5_000),
    shorter=st.integers(0, 5_000),
    ran=st.integers(0, 50),
)
def test_what_ran_out_of_memory_fits_no_more_and_nothing_longer_does_either(
    *, model: CostModel | None, size: int, length: int, shorter: int, ran: int
) -> None:
    limits = Limits(100, 100, cost=None if model is None else OnlineCost(model))
    limits.out_of_memory(size, length)
    for _ in range(ran):
        limits.ran()
    assume(limits.by_length)  # else nothing is known of how memory goes with it
    most = limits.n_max(length)
    assert 1 <= most < size
    assert most >= int(size / 1.26) or most >= 1 == int(size / 1.26)
    assert most <= limits.n_max(min(shorter, length))
    assert limits.rule(length) == "memory"
    assert limits.fits_alone(length, 1), "it may always be tried alone"


def test_after_an_out_of_memory_batches_grow_again_slowly() -> None:
    limits = Limits(100, 100)
    limits.out_of_memory(50, 1)
    assert limits.n_max(1) == 40
    batches = 0
    while limits.n_max(1) < 50:
        limits.ran()
        batches += 1
    assert 2_000 < batches < 2_500
    limits.out_of_memory(50, 1)
    limits.forgive()
    assert limits.n_max(1) == 50


def test_out_of_memory_leaves_room_beside_a_model_that_is_most_of_the_budget() -> None:
    cost = OnlineCost(CostModel(1.0, a_bytes=850, b_bytes=1))
    limits = Limits(100, 100, cost=cost, memory_budget_bytes=900)
    assert limits.n_max(1) == 50
    limits.out_of_memory(50, 1)
    assert limits.n_max(1) == 40


def test_whether_a_record_fits_alone_does_not_change_with_what_is_seen() -> None:
    cost = OnlineCost(CostModel(1.0, a_bytes=850, b_bytes=1))
    limits = Limits(100, 100, cost=cost, memory_budget_bytes=900)
    cost.observe_memory(851, 1_000)
    assert limits.n_max(1) == 0
    assert limits.fits_alone(1, 1)


def test_a_kappa_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        OnlineCost(MEMORY, kappa=0.9)
