"""The oracle finds what is planted, and nothing where nothing is."""

from __future__ import annotations

from collections.abc import Callable

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chaos.oracle import (
    CLOCK_MS,
    ROUND_MS,
    Duplicate,
    Sample,
    TaskOracle,
    explain,
    held_before,
    rounds_of,
)
from tests.chaos.records import Fate, answer_to, fate_of, value_of

PARTITIONS, COUNT = 2, 520  # with records of each fate
WRITTEN_MS = 1_000


class Topics:
    """A task's topics after a run in which all went well; a test breaks something before it shows them."""

    def __init__(self) -> None:
        self.inputs = {partition: [value_of(partition, n) for n in range(COUNT)] for partition in range(PARTITIONS)}
        self.results = {partition: [self.result(partition, n) for n in self.of(Fate.RESULT)] for partition in range(2)}
        self.dead = {
            partition: [self.letter(partition, n) for n in range(COUNT) if fate_of(n) != Fate.RESULT]
            for partition in range(2)
        }
        self.final = dict.fromkeys(range(PARTITIONS), COUNT)
        self.seen: list[tuple[int, int, int]] = []

    @staticmethod
    def of(fate: Fate) -> list[int]:
        return [n for n in range(COUNT) if fate_of(n) == fate]

    @staticmethod
    def result(partition: int, n: int, *, at_ms: int = WRITTEN_MS, answer: int | None = None) -> tuple[int, bytes]:
        told = {
            "result": {"partition": partition, "number": n, "answer": answer or answer_to(partition, n)},
            "source": {"topic": "in", "partition": partition, "offset": n},
            "task": "alo",
        }
        return at_ms, orjson.dumps(told)

    @staticmethod
    def letter(partition: int, n: int) -> tuple[int, bytes, list[tuple[str, bytes | None]]]:
        headers: list[tuple[str, bytes | None]] = [
            ("streamproc-source-partition", b"%d" % partition),
            ("streamproc-source-offset", b"%d" % n),
            ("streamproc-stage", b"decode" if fate_of(n) == Fate.BROKEN else b"execute"),
        ]
        return WRITTEN_MS, value_of(partition, n), headers

    def judged(self, *, exactly_once: bool = False) -> TaskOracle:
        oracle = TaskOracle("alo", PARTITIONS)
        for partition in range(PARTITIONS):
            for offset, value in enumerate(self.inputs[partition]):
                oracle.input(partition, offset, value)
        for partition in range(PARTITIONS):
            for offset, (at_ms, value) in enumerate(self.results[partition]):
                oracle.result(partition, offset, at_ms, value)
        for partition in range(PARTITIONS):
            for offset, (at_ms, value, headers) in enumerate(self.dead[partition]):
                oracle.dead(partition, offset, at_ms, value, headers)
        oracle.check_input([COUNT] * PARTITIONS)
        oracle.check_deliveries(exactly_once=exactly_once)
        oracle.check_commits(self.seen, self.final)
        return oracle

    def found(self, *, exactly_once: bool = False) -> dict[str, int]:
        return {what: it.count for what, it in self.judged(exactly_once=exactly_once).findings.items()}


@pytest.mark.parametrize("exactly_once", [False, True])
def test_where_all_went_well_nothing_is_found(exactly_once: bool) -> None:
    oracle = Topics().judged(exactly_once=exactly_once)
    assert oracle.findings == {}
    assert (oracle.records, oracle.results + oracle.dead_letters) == (PARTITIONS * COUNT, PARTITIONS * COUNT)
    assert min(oracle.results, oracle.dead_letters) > 0


@settings(deadline=None)
@given(st.sampled_from(Topics.of(Fate.RESULT)), st.integers(0, PARTITIONS - 1))
def test_a_lost_result_is_found_and_so_is_the_commit_beyond_it(n: int, partition: int) -> None:
    topics = Topics()
    topics.results[partition].remove(Topics.result(partition, n))
    topics.seen = [(WRITTEN_MS + 1, partition, n), (WRITTEN_MS + 2, partition, n + 1)]
    oracle = topics.judged()
    assert set(oracle.findings) == {"lost", "committed before it was delivered"}
    assert {it.count for it in oracle.findings.values()} == {1}
    assert oracle.findings["lost"].examples == [f"alo input {partition}@{n} (number {n})"]


def test_a_lost_dead_letter_is_found() -> None:
    topics = Topics()
    del topics.dead[0][0]
    assert topics.found() == {"lost": 1}


def test_a_duplicate_is_counted_and_breaks_exactly_once_alone() -> None:
    topics = Topics()
    topics.results[1].append(Topics.result(1, 7, at_ms=WRITTEN_MS + 300))
    assert topics.found() == {}
    assert topics.found(exactly_once=True) == {"delivered twice": 1}
    where = f"alo results 1@{len(topics.results[1]) - 1}"
    assert topics.judged().duplicates == [Duplicate(WRITTEN_MS + 300, 1, 7, where, WRITTEN_MS)]


def test_a_result_beside_a_dead_letter_is_a_duplicate_of_the_wrong_kind() -> None:
    topics = Topics()
    n = Topics.of(Fate.REFUSED)[0]
    topics.results[0].append(Topics.result(0, n))
    oracle = topics.judged()
    assert len(oracle.duplicates) == 1
    assert set(oracle.findings) == {"wrong content", "out of order"}


@settings(deadline=None)
@given(st.data())
def test_first_deliveries_out_of_order_are_found_and_repetitions_are_in_order(data: st.DataObject) -> None:
    topics = Topics()
    results = topics.results[0]
    low = data.draw(st.integers(0, len(results) - 2))
    high = data.draw(st.integers(low + 1, len(results) - 1))
    results[low], results[high] = results[high], results[low]
    assert topics.found() == {"out of order": high - low}
    results[low], results[high] = results[high], results[low]
    results[high + 1 : high + 1] = results[low : high + 1]
    assert topics.found() == {}
    assert len(topics.judged().duplicates) == high - low + 1


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (lambda it: it.results[0].append(Topics.result(0, COUNT)), {"never produced": 1}),
        (lambda it: it.results[0].append(Topics.result(9, 0)), {"never produced": 1}),
        (lambda it: it.results[0].__setitem__(0, Topics.result(0, 0, answer=99)), {"wrong content": 1}),
        (lambda it: it.results[0].__setitem__(0, (WRITTEN_MS, b"?")), {"wrong content": 1, "lost": 1}),
        (lambda it: it.dead[0].__setitem__(0, (WRITTEN_MS, b"?", it.dead[0][0][2])), {"wrong content": 1}),
        (lambda it: it.dead[0].__setitem__(0, (WRITTEN_MS, b"?", [])), {"wrong content": 1, "lost": 1}),
        (
            lambda it: (it.results[0].pop(3), it.dead[0].append(Topics.letter(0, 3))),
            {"good records given up": 1, "out of order": 1},
        ),
        (lambda it: it.results[0].insert(0, it.results[1].pop(0)), {"wrong content": 1}),
        (lambda it: it.inputs[0].append(b"{}"), {"input of somebody else": 1, "input out of order": 1}),
    ],
)
def test_what_nobody_asked_for_is_found(plant: Callable[[Topics], object], expected: dict[str, int]) -> None:
    topics = Topics()
    plant(topics)
    topics.final = {partition: len(values) for partition, values in topics.inputs.items()}
    assert topics.found() == expected


def test_input_that_the_cluster_lost_is_told_from_what_streamproc_lost() -> None:
    topics = Topics()
    topics.inputs[1].pop()
    topics.results[1].pop()
    topics.final = {0: COUNT, 1: COUNT - 1}
    assert topics.found() == {"input lost by the cluster": 1}


def test_commits_are_compared_with_what_was_delivered_by_then() -> None:
    topics = Topics()
    topics.results[0][200] = Topics.result(0, topics.of(Fate.RESULT)[200], at_ms=5_000)
    late = topics.of(Fate.RESULT)[200]
    topics.seen = [(WRITTEN_MS, 0, late), (5_000 - CLOCK_MS, 0, late + 1), (5_000, 1, COUNT)]
    assert topics.found() == {}
    topics.seen = [(5_000 - CLOCK_MS - 1, 0, late + 1)]
    assert topics.found() == {"committed before it was delivered": 1}
    topics.seen = [(5_000, 0, 9), (5_500, 0, 8)]
    assert topics.found() == {"commits that went back": 1}
    topics.seen = [(5_000, 0, COUNT + 1)]
    assert topics.found() == {"committed beyond the end": 1}


def test_what_is_not_committed_at_the_end_is_found() -> None:
    topics = Topics()
    topics.final = {0: COUNT - 1}
    assert topics.found() == {"not committed at the end": 2}


def test_the_longest_stall_is_that_of_all_results_and_that_of_one_partition() -> None:
    topics = Topics()
    for partition, times in {0: [1_000, 4_000], 1: [2_000, 9_000]}.items():
        topics.results[partition][-2:] = [
            Topics.result(partition, n, at_ms=at_ms)
            for n, at_ms in zip(Topics.of(Fate.RESULT)[-2:], times, strict=True)
        ]
    assert topics.judged().longest_stall_s() == (5.0, 7.0)


# -- duplicates, and what was in flight


def test_assignments_to_several_replicas_are_one_rebalance() -> None:
    rounds = rounds_of([(1_000, 1), (1_400, 2), (1_000 + ROUND_MS + 1, 3), (1_000 + ROUND_MS + 2, 3)])
    assert [(it.at_ms, it.replicas) for it in rounds] == [
        (1_000, {1, 2}),
        (1_000 + ROUND_MS + 1, {3}),
        (1_000 + ROUND_MS + 2, {3}),
    ]


def held(committed: int, position: int) -> dict[int, tuple[int, int]]:
    return {0: (committed, position)}


def again(offset: int, at_ms: int) -> Duplicate:
    return Duplicate(at_ms, 0, offset, "", 0)


GROWTH = 50


def test_what_was_seen_last_is_what_a_process_held_and_more_where_it_was_still_reading() -> None:
    samples: list[Sample] = [(1_000, held(10, 20)), (1_500, held(12, 30)), (2_000, held(15, 30)), (2_500, {})]
    assert held_before(0, 999, samples, GROWTH) == {}
    assert held_before(0, 1_000, samples, GROWTH) == {0: (range(10, 20 + GROWTH), 10)}
    assert held_before(0, 1_999, samples, GROWTH) == {0: (range(12, 30 + GROWTH), 18)}
    assert held_before(0, 2_499, samples, GROWTH) == {0: (range(15, 30), 15)}


def test_what_a_process_let_go_since_the_last_rebalance_was_in_flight_before_this_one() -> None:
    samples: list[Sample] = [(1_500, held(12, 30)), (2_000, held(15, 30)), (2_500, {}), (3_000, {})]
    assert held_before(1_800, 2_700, samples, GROWTH) == {0: (range(15, 30), 15)}
    assert held_before(2_000, 2_700, samples, GROWTH) == {}
    assert held_before(2_600, 9_000, samples, GROWTH) == {}
    assert held_before(1_600, 1_700, samples, GROWTH) == {0: (range(12, 30 + GROWTH), 18)}


def test_a_duplicate_was_in_flight_before_a_rebalance_or_has_no_reason() -> None:
    zombie: list[Sample] = [(1_000, held(10, 20)), (1_500, held(10, 20)), (9_000, held(10, 99))]
    rounds = rounds_of([(500, 1), (6_000, 2)])
    read_later = again(20, 8_000)
    early = again(15, 400)
    other = Duplicate(7_000, 1, 15, "", 0)
    twice = [again(15, 7_000), again(15, 8_000)]
    assert explain(
        rounds, [again(10, 6_000), *twice, again(19, 8_000), read_later, early, other], [zombie], GROWTH
    ) == [
        twice[1],
        read_later,
        early,
        other,
    ]
    assert [(it.in_flight, it.again) for it in rounds] == [(0, set()), (10, {(0, 10), (0, 15), (0, 19)})]


def test_a_record_may_come_again_for_each_rebalance_before_which_it_was_in_flight() -> None:
    first: list[Sample] = [(1_000, held(10, 20)), (1_500, held(10, 20))]
    second: list[Sample] = [(3_000, held(10, 18)), (3_500, held(10, 18))]
    rounds = rounds_of([(2_600, 2), (8_000, 3)])
    assert explain(rounds, [again(12, 4_000), again(12, 8_500), again(19, 8_600)], [first, second], GROWTH) == []
    assert [(it.in_flight, it.again) for it in rounds] == [(10, {(0, 12), (0, 19)}), (8, {(0, 12)})]


def test_what_a_process_held_that_ended_counts_for_the_next_rebalance_alone() -> None:
    killed: list[Sample] = [(1_000, held(10, 20)), (1_500, held(10, 30))]
    rounds = rounds_of([(7_000, 2), (12_000, 3)])
    assert explain(rounds, [again(30 + GROWTH - 1, 7_500)], [killed, []], GROWTH) == []
    assert [it.in_flight for it in rounds] == [20, 0]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50_000), st.integers(1, 4)), max_size=20),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 50_000)), max_size=50),
)
def test_at_most_what_was_in_flight_is_explained(
    assignments: list[tuple[int, int]], repetitions: list[tuple[int, int]]
) -> None:
    rounds = rounds_of(assignments)
    duplicates = [again(offset, at_ms) for offset, at_ms in repetitions]
    samples: list[Sample] = [(0, held(0, 10)), (1, held(0, 10)), (50_000, held(0, 10))]
    unexplained = explain(rounds, duplicates, [samples], 0)
    assert all(len(it.again) <= it.in_flight <= 10 for it in rounds)
    assert len(unexplained) + sum(len(it.again) for it in rounds) == len(duplicates)
    assert all(any(it is some for some in duplicates) for it in unexplained)
