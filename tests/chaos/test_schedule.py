"""The schedule of faults: the same for the same seed, and within its promises for every seed."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chaos.schedule import CUTS, LASTS_S, QUIET_S, Fault, Kind, make_schedule

seeds = st.integers(0, 2**32)
durations = st.floats(60, 1_200)


def disturbed(fault: Fault, at_s: float) -> bool:
    return fault.at_s <= at_s <= fault.ends_s


@settings(deadline=None)
@given(seeds, durations)
def test_the_same_seed_gives_the_same_faults(seed: int, duration_s: float) -> None:
    assert make_schedule(seed, duration_s) == make_schedule(seed, duration_s)


def test_another_seed_gives_other_faults() -> None:
    assert make_schedule(1, 120) != make_schedule(2, 120)


@settings(deadline=None)
@given(seeds, durations)
def test_every_kind_comes_once_before_any_comes_twice(seed: int, duration_s: float) -> None:
    kinds = [fault.kind for fault in make_schedule(seed, duration_s)]
    for start in range(0, len(kinds), len(Kind)):
        some = kinds[start : start + len(Kind)]
        assert len(set(some)) == len(some)
    assert set(kinds[: len(Kind)]) == set(Kind)


@settings(deadline=None)
@given(seeds, durations)
def test_faults_are_in_order_and_beyond_the_first_round_none_is_late(seed: int, duration_s: float) -> None:
    schedule = make_schedule(seed, duration_s)
    begins = [fault.at_s for fault in schedule]
    assert begins == sorted(begins)
    assert all(begin <= duration_s - QUIET_S + 0.1 for begin in begins[len(Kind) :])


@settings(deadline=None)
@given(seeds)
def test_a_run_of_ten_minutes_has_a_fault_every_five_to_fifteen_seconds(seed: int) -> None:
    schedule = make_schedule(seed, 600)
    assert 600 / 15 <= len(schedule) <= 600 / 5


@settings(deadline=None)
@given(seeds, durations)
def test_targets_fit_their_kinds(seed: int, duration_s: float) -> None:
    for fault in make_schedule(seed, duration_s):
        low, high = LASTS_S[fault.kind]
        assert low <= fault.lasts_s <= high
        if fault.kind == Kind.KILL_BROKER:
            assert fault.replica is None
            assert fault.node in (1, 2, 3)
        elif fault.kind == Kind.EXTRA_REPLICA:
            assert (fault.replica, fault.node) == (4, None)
        else:
            assert fault.replica in (1, 2, 3)
            assert fault.node in (None, 1, 2, 3) if fault.kind in CUTS else fault.node is None


@settings(deadline=None)
@given(seeds, durations)
def test_at_most_one_node_is_disturbed_and_one_replica_never(seed: int, duration_s: float) -> None:
    schedule = make_schedule(seed, duration_s)
    for fault in schedule:
        now = [other for other in schedule if disturbed(other, fault.at_s)]
        assert len([other for other in now if other.node is not None]) <= 1
        hit = [other.replica for other in now if other.replica in (1, 2, 3)]
        assert len(hit) == len(set(hit)) <= 2
