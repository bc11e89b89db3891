"""The exact planner against every way in which records can be divided."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.runtime.cost import CostModel
from streamproc.runtime.grouping import cheapest_division, reach
from streamproc.runtime.limits import Limits
from streamproc.runtime.online_cost import OnlineCost

CASES = 1_500
MOST = 9


def plan(
    lengths: Sequence[int], model: CostModel, limits: Limits, sizes: Sequence[int] | None = None
) -> tuple[list[int], float]:
    totals = range(len(lengths) + 1)
    byte_totals = None if sizes is None else list(accumulate(sizes, initial=0))
    return cheapest_division(
        [model.record_ms(length) for length in lengths],
        totals,
        model.alpha_ms,
        reach(lengths, totals, limits, byte_totals=byte_totals),
    )


def least_of_all_set_partitions(count: int, cost_of: Callable[[int], float | None]) -> float:
    """Each set partition has one part with the first of the records: that part, and the best of the rest."""

    @cache
    def best(left: int) -> float:
        if not left:
            return 0.0
        first = left & -left
        others = left ^ first
        part, least = others, float("inf")
        while True:
            own = cost_of(first | part)
            if own is not None:
                least = min(least, own + best(others ^ part))
            if not part:
                return least
            part = (part - 1) & others

    return best((1 << count) - 1)


def random_case(rng: random.Random) -> tuple[list[int], CostModel, Limits]:
    count = rng.randint(1, MOST)
    spread = rng.choice([3, 30, 300])
    lengths = sorted(rng.randint(0, spread) for _ in range(count))
    model = CostModel(
        rng.choice([0.0, 0.5, 5.0, 50.0]),
        rng.choice([0.0, 0.02]) + 1e-6,
        rng.choice([0.0, 0.01]),
        rng.choice([0.0, 1e-4]),
        a_bytes=rng.choice([0, 50]),
        b_bytes=rng.choice([0, 1]),
        c_bytes=rng.choice([0, 1]),
        d_bytes=rng.choice([0, 0.01]),
    )
    limits = Limits(
        rng.randint(1, MOST),
        1,
        max_padded=rng.choice([None, spread, 3 * spread]),
        cost=OnlineCost(model, kappa=rng.choice([1.0, 1.5])),
        memory_budget_bytes=rng.choice([None, 60.0, 100.0 + 3 * spread]),
    )
    return lengths, model, limits


def test_it_equals_brute_force_over_all_set_partitions() -> None:
    rng = random.Random(20_240_601)
    limited = 0
    for _ in range(CASES):
        lengths, model, limits = random_case(rng)

        def cost_of(
            part: int, lengths: list[int] = lengths, model: CostModel = model, limits: Limits = limits
        ) -> float | None:
            size, length = part.bit_count(), lengths[part.bit_length() - 1]
            return model.time_ms(size, length) if size == 1 or size <= limits.n_max(length) else None

        ends, found = plan(lengths, model, limits)
        assert found == pytest.approx(least_of_all_set_partitions(len(lengths), cost_of), rel=1e-9)
        begins = [0, *ends[:-1]]
        parts = [(end - begin, lengths[end - 1]) for begin, end in zip(begins, ends, strict=True)]
        assert ends[-1] == len(lengths)
        assert all(size == 1 or size <= limits.n_max(length) for size, length in parts)
        assert sum(model.time_ms(*part) for part in parts) == pytest.approx(found, rel=1e-9)
        limited += any(limits.n_max(length) < len(lengths) for length in lengths)
    assert limited > CASES / 4, "cases in which the limits matter"


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=MOST),
    st.floats(0.001, 20),
    st.integers(1, MOST),
    st.integers(1, 40),
)
@settings(max_examples=400, deadline=None)
def test_with_a_limit_on_bytes_it_is_the_best_division_into_runs(
    records: list[tuple[int, int]], alpha: float, max_size: int, max_bytes: int
) -> None:
    records.sort()
    lengths, sizes = [it[0] for it in records], [it[1] for it in records]
    model, limits = CostModel(alpha, 0.1, 0.02), Limits(max_size, max_bytes)
    best = [0.0]
    for end in range(1, len(records) + 1):
        best.append(
            min(
                best[begin] + model.time_ms(end - begin, lengths[end - 1])
                for begin in range(end)
                if end - begin == 1 or (end - begin <= max_size and sum(sizes[begin:end]) <= max_bytes)
            )
        )
    ends, found = plan(lengths, model, limits, sizes)
    assert found == pytest.approx(best[-1], rel=1e-9)
    assert all(
        end - begin == 1 or sum(sizes[begin:end]) <= max_bytes for begin, end in zip([0, *ends], ends, strict=False)
    )


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(1, 30)), min_size=1, max_size=25),
    st.floats(0.001, 20),
    st.integers(1, 60),
    st.one_of(st.none(), st.integers(1, 5_000)),
)
@settings(max_examples=400, deadline=None)
def test_groups_that_stay_together_are_divided_as_a_plain_search_does(
    groups: list[tuple[int, int]], alpha: float, max_size: int, max_padded: int | None
) -> None:
    groups.sort()
    lengths = [it[0] for it in groups]
    totals = list(accumulate([it[1] for it in groups], initial=0))
    model, limits = CostModel(alpha, 0.1, 0.02), Limits(max_size, 1, max_padded=max_padded)
    best = [0.0]
    for end in range(1, len(groups) + 1):
        most = limits.n_max(lengths[end - 1])
        best.append(
            min(
                best[begin] + model.time_ms(totals[end] - totals[begin], lengths[end - 1])
                for begin in range(end)
                if end - begin == 1 or totals[end] - totals[begin] <= most
            )
        )
    costs = [model.record_ms(length) for length in lengths]
    _, found = cheapest_division(costs, totals, alpha, reach(lengths, totals, limits))
    assert found == pytest.approx(best[-1], rel=1e-9)
