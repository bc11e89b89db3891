"""The bookkeeping of the benchmarks: they count every record, and say so where one is missing or a curve is bent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import growth, latency, startup
from benchmarks.quantiles import quantile, summary_ms

numbers = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=200)


@given(numbers, st.floats(0.001, 1))
def test_a_quantile_is_the_least_value_that_enough_do_not_exceed(values: list[float], share: float) -> None:
    found = quantile(sorted(values), share)
    assert found in values
    assert sum(it <= found for it in values) >= share * len(values)
    assert sum(it < found for it in values) < share * len(values)


def test_a_single_stall_is_in_the_summary() -> None:
    its = summary_ms([1.0] * 999 + [500.0])
    assert (its["count"], its["p50_ms"], its["p99_ms"], its["p999_ms"], its["max_ms"]) == (1_000, 1.0, 1.0, 1.0, 500.0)
    assert summary_ms([1.0] * 98 + [500.0] * 2)["p99_ms"] == 500.0


def result(number: int, due_ns: int) -> bytes:
    return latency.WRAPPED + latency.value(number, due_ns) + b',"metrics":{},"source":{}}'


@given(st.integers(0, 10**8), st.integers(0, 10**15))
def test_a_result_tells_its_number_and_when_it_was_due(number: int, due_ns: int) -> None:
    assert len(latency.value(number, due_ns)) == latency.VALUE_BYTES
    for one, wrapped in ((result(number, due_ns), True), (latency.value(number, due_ns), False)):
        numbers, dues = latency.read_back([one, one], wrapped=wrapped)
        assert (list(numbers), list(dues)) == ([number] * 2, [due_ns] * 2)


def test_every_result_that_is_missing_twice_or_damaged_is_told() -> None:
    whole = latency.Arrivals(3, wrapped=True)
    whole.take([result(0, 5), result(2, 6)], 1_000_006)
    assert not whole.complete()
    with pytest.raises(SystemExit, match="1 results are missing, 0 came twice, 0 are damaged"):
        whole.check()
    whole.take([result(1, 7)], 2_000_007)
    assert whole.complete()
    whole.check()
    assert list(whole.latency_ns) == [1_000_001, 1_000_000, 2_000_000]
    whole.take([result(1, 7)], 2_000_007)
    with pytest.raises(SystemExit, match="0 results are missing, 1 came twice"):
        whole.check()
    harmed = latency.Arrivals(1, wrapped=True)
    harmed.take([result(0, 5).replace(b"xx", b"xy", 1)], 6)
    with pytest.raises(SystemExit, match="1 are damaged"):
        harmed.check()


def test_latencies_count_from_the_end_of_the_warm_up() -> None:
    arrivals = latency.Arrivals(3, wrapped=True)
    arrivals.take([result(0, 10**9), result(1, 3 * 10**9), result(2, 3 * 10**9 - 1)], 4 * 10**9)
    assert latency.counted_ms(arrivals, 2.0) == [1_000.0]


def test_the_rate_is_that_of_the_middle() -> None:
    slow_begin = [second * 10**9 for second in range(10)]
    steady = [10 * 10**9 + tenth * 10**8 for tenth in range(90)]
    assert latency.middle_rate(slow_begin + steady) == pytest.approx(10.0)


def found(rate: float, *, mib_per_s: float = 1.0, peak: float = 80.0) -> growth.Measured:
    return growth.Measured(rate, mib_per_s, peak, 50.0, 10.0, 3.0)


def test_a_curve_that_bends_is_told() -> None:
    level, bent = [found(100), found(95), found(98)], [found(100), found(60), found(98)]
    assert growth.flat((1, 2, 4), level) == []
    assert growth.flat((1, 2, 4), bent) == ["the rate at 2 is below 70% of the best"]
    assert growth.grows_then_flat((1, 2, 4), [found(10), found(50), found(45)]) == []
    assert len(growth.grows_then_flat((1, 2, 4), [found(10), found(50), found(30)])) == 1
    assert growth.linear((1, 2, 4), [found(10), found(19), found(33)]) == []
    assert growth.linear((1, 2, 4), [found(10), found(19), found(20)]) == ["4 are 2.0 times as fast as one"]
    assert growth.more_bytes((1, 2), [found(1, mib_per_s=10), found(1, mib_per_s=90)]) == []
    assert len(growth.more_bytes((1, 2), [found(1, mib_per_s=90), found(1, mib_per_s=10)])) == 1


def test_memory_that_grows_is_told() -> None:
    steady = [found(9, peak=60), found(9, peak=80), found(9, peak=84)]
    assert growth.flat_memory((1, 2, 3), steady) == []
    assert len(growth.flat_memory((1, 2, 3), [*steady[:2], found(9, peak=120)])) == 1


@pytest.mark.parametrize("name", growth.SWEEPS)
def test_every_point_of_a_sweep_has_a_record_for_every_partition(name: str) -> None:
    for sweep in (growth.SWEEPS[name], growth.quick(growth.SWEEPS[name])):
        points = sweep.points()
        assert [getattr(it, sweep.field) for it in points] == list(sweep.values)
        assert all(it.records >= it.partitions * it.tasks for it in points)


@given(st.integers(0, 10**8), st.integers(100, 2_000))
def test_contents_are_compared_with_what_was_sent(number: int, size: int) -> None:
    sent = growth.value(number, size)
    assert len(sent) == size
    growth.check_contents([b'{"result":%b}' % sent], size)
    with pytest.raises(SystemExit, match="another content"):
        growth.check_contents([b'{"result":%b}' % sent.replace(b"xx", b"xy", 1)], size)


def test_import_times_are_summed_by_package() -> None:
    report = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:      1500 |       1500 |   json.decoder\n"
        "import time:       500 |       2000 | json\n"
        "import time:      7000 |       9000 |     pydantic.main\n"
        "something else\n"
    )
    assert startup.imports_of(report) == {"pydantic": 7.0, "the standard library": 2.0}


def test_steps_are_told_in_their_order_and_once() -> None:
    log = [(0.5, "the sidecar answers at x"), (0.4, "worker 0 (pid 1) initialized in 0.1 s")]
    log += [(0.7, "the circuit is already open"), (0.9, "ready"), (1.0, "ready")]
    assert list(startup.steps_of(log).values()) == [0.4, 0.5, 0.9]
