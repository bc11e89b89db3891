"""The search: which shapes are measured, with a stand-in for the process that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from streamproc.errors import EstimateError
from streamproc.estimate.fit import Seen, fit
from streamproc.estimate.measure import by_memory, region_of
from streamproc.estimate.prober import End, Ran
from streamproc.estimate.samples import Samples, measure_of
from streamproc.estimate.search import GAP, Explored, Search
from streamproc.settings import LengthSettings

MIB = 1 << 20
BYTES = measure_of(LengthSettings(of="bytes"), by_backend=len)
RECORDS = [{"text": "x" * it} for it in (20, 90, 400, 1_600)]


@dataclass
class Machine:
    """Stands in for a probe: time and memory by formulas; ``kept`` is the share of a peak that it holds on to."""

    limit_bytes: float = 1e12
    ms_each: float = 0.5
    bytes_each: float = 0.0
    kept: float = 0.0
    failing: float = 0.0
    disturbed: float = 1.0
    while_ran: range = range(0)
    """The shapes, by number, that run while something disturbs the machine."""
    now: float = 0.0
    held: float = 0.0
    starts: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def start(self) -> None:
        self.starts += 1
        self.held = 0.0
        self.now += 0.1

    def run(
        self, batches: Sequence[Sequence[dict[str, Any]]], *, seconds: float, runs: int = 7, fresh: bool = True
    ) -> Ran | End:
        assert isinstance(fresh, bool)
        assert runs >= 1
        assert seconds >= 0
        size, length = len(batches[0]), max(BYTES(it) for it in batches[0])
        assert {len(it) for it in batches} == {size}
        self.sizes.append((size, length))
        needed = 100 * MIB + max(size * length**2 * self.bytes_each, self.held)
        if needed > self.limit_bytes:
            self.held = 0.0
            return End.MEMORY
        self.held = max(self.held, (needed - 100 * MIB) * self.kept)
        took_ms = (5 + size * self.ms_each) * (self.disturbed if len(self.sizes) in self.while_ran else 1)
        self.now += 4 * took_ms / 1_000
        return Ran([took_ms] * 3, round(needed), round(size * self.failing))


def search(machine: Machine, *, max_size: int = 64, budget: float = 1e12, seconds: float = 1_000.0) -> Search:
    return Search(
        machine,
        Samples(RECORDS, BYTES),
        max_size=max_size,
        budget_bytes=budget,
        seconds=seconds,
        load_seconds=0.1,
        clock=lambda: machine.now,
    )


def test_sizes_double_up_to_the_limit_at_each_length() -> None:
    machine = Machine()
    for it in search(machine, max_size=50).explore():
        assert [seen.size for seen in it.seen] == [1, 2, 4, 8, 16, 32, 50]
        assert (it.ended_by, it.too_large) == ("size", None)


def test_each_length_begins_in_a_fresh_process() -> None:
    machine = Machine(bytes_each=10.0, kept=1.0)
    explored = search(machine).explore()
    assert machine.starts == len(explored) + 1, "and all of them once more in another one"
    for it in explored:
        for seen in it.seen:
            assert seen.peak_bytes == pytest.approx(100 * MIB + seen.size * seen.length**2 * 10, rel=1e-6)


@pytest.mark.parametrize("limited_by", ["machine", "budget"])
def test_where_memory_ends_it_the_largest_that_fits_is_found_within_5_percent(limited_by: str) -> None:
    limit = 1_000.0 * MIB
    machine = Machine(bytes_each=20.0, limit_bytes=limit if limited_by == "machine" else 1e12)
    explored = search(machine, max_size=100_000, budget=limit if limited_by == "budget" else 1e12).explore()
    ended = [it for it in explored if it.ended_by == "memory"]
    assert ended
    for it in ended:
        most = int((limit - 100 * MIB) / (20 * it.length**2))
        assert it.largest <= most
        assert it.largest * GAP + 1 >= most


def test_time_ends_the_search_of_a_length_and_leaves_enough_for_the_others() -> None:
    machine = Machine(ms_each=100.0)
    explored = search(machine, max_size=1_024, seconds=60.0).explore()
    assert {it.ended_by for it in explored} == {"time"}
    assert all(it.largest >= 2 for it in explored)
    assert machine.now < 60.0


def test_the_longest_comes_first_since_memory_ends_there() -> None:
    machine = Machine()
    explored = search(machine, max_size=1).explore()
    tried = [length for _, length in machine.sizes[: len(explored)]]
    assert tried == sorted(tried, reverse=True)
    assert [it.length for it in explored] == sorted(tried)


def test_what_disturbs_the_machine_for_a_while_does_not_count() -> None:
    quiet = search(Machine(), max_size=8).explore()
    disturbed = search(Machine(disturbed=5.0, while_ran=range(4, 12)), max_size=8).explore()
    assert [it.seen for it in disturbed] == [it.seen for it in quiet]


def test_where_not_even_one_record_fits_it_says_so() -> None:
    with pytest.raises(EstimateError, match="not even the shortest record fits into 50 MiB"):
        search(Machine(), budget=50 * MIB).explore()


def test_records_that_fail_are_no_measure() -> None:
    with pytest.raises(EstimateError, match="sample records fail"):
        search(Machine(failing=1.0)).explore()


def test_few_records_that_fail_are_counted() -> None:
    it = search(Machine(failing=0.25), max_size=8)
    it.explore()
    assert 0 < it.failed < 0.3 * it.ran


def test_held_out_shapes_are_run_in_the_order_of_their_memory() -> None:
    machine = Machine(bytes_each=10.0, kept=1.0)
    it = search(machine)
    memory = fit([seen for at in it.explore() for seen in at.seen], by_memory)
    machine.sizes.clear()
    found = it.held_out(lambda _: 64, memory.predict)
    assert len(found) == 12
    assert [seen.peak_bytes for seen in found] == sorted(seen.peak_bytes for seen in found)
    for seen in found:
        assert memory.predict(seen.size, seen.length) == pytest.approx(seen.peak_bytes, rel=1e-3)


def test_a_held_out_shape_that_does_not_fit_counts_as_more_than_the_budget() -> None:
    machine = Machine(bytes_each=10.0)
    it = search(machine, budget=2_000 * MIB)
    machine.limit_bytes = 101 * MIB
    worst = max(seen.peak_bytes for seen in it.held_out(lambda _: 64, lambda size, length: size * length))
    assert worst == pytest.approx(2_000 * MIB * GAP)


def test_a_process_that_runs_everything_in_any_order_shows_what_an_allocator_keeps() -> None:
    machine = Machine(bytes_each=10.0)
    most = search(machine).mixed([(4, 1_611), (1, 101)])
    assert most == pytest.approx(100 * MIB + 4 * 1_611**2 * 10, rel=1e-3)
    assert sorted(machine.sizes) == [(1, 101), (1, 101), (4, 1_611), (4, 1_611)]


def test_batches_run_up_to_the_size_and_padded_length_that_still_help() -> None:
    def at(length: int, *seen: tuple[int, float]) -> Explored:
        return Explored(length, False, [Seen(size, length, time_ms, 1.0) for size, time_ms in seen])

    short = at(10, (1, 5.0), (2, 5.0), (4, 5.0), (8, 5.0), (16, 9.0))
    long = at(1_000, (1, 50.0), (2, 80.0), (4, 170.0), (8, 400.0))
    region = region_of([short, long], has_length=True)
    assert (region.max_size, region.max_padded) == (16, 4_000)
    assert region.has(1, 9_000)
    assert region.has(16, 250)
    assert not region.has(16, 251)
    assert not region.has(17, 1)
    assert [region.largest(length) for length in (10, 1_000, 9_000)] == [16, 4, 1]
    assert region_of([short], has_length=False).max_padded is None
