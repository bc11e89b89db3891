"""The measuring's bookkeeping with a process that a test plays: order, deaths, deadlines, garbage, discards."""

from __future__ import annotations

import asyncio
import signal
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamproc.errors import ReloadRefusedError, WorkerStartError
from streamproc.records import NULL_SIZE, Cause, Failure, Lease, Span
from streamproc.runtime.measuring import CHUNKS_IN_PROCESS, MAX_CHUNK_BYTES
from streamproc.runtime.wire import (
    HEADER,
    MAX_CHUNK_RECORDS,
    MAX_LENGTH,
    UNMEASURED,
    Kind,
    WireError,
    decode_lengths,
    decode_values,
    encode_frame,
    values_parts,
)
from tests.support.fake_measurer import Bench
from tests.support.spans import lease, span


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(["text", "image"])
    yield made
    made.close()


@pytest.fixture
def ready(bench: Bench) -> Bench:
    bench.process.become_ready()
    return bench


# -- the wire


def test_values_arrive_as_they_were_sent_with_nulls_and_empty_ones_apart() -> None:
    spans = [span(lease(), 0, 3, values=[b"ab", b"", b"c"]), span(lease(1), 0, 1, value=b"xyz")]
    spans[0].records[2].value = None  # type: ignore[misc]  # a test's record, whose value may be set
    spans[0].sizes = [2, 0, NULL_SIZE]
    spans[0].size_bytes = 2
    parts, size = values_parts(spans)
    body = b"".join(parts)
    assert len(body) == size
    assert [None if it is None else bytes(it) for it in decode_values(body, 4)] == [b"ab", b"", None, b"xyz"]


@pytest.mark.parametrize(
    "body", [b"", bytes(15), array("q", [1, 2]).tobytes() + b"xx", array("q", [-2, 2]).tobytes() + b"xx"]
)
def test_what_are_no_values_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        decode_values(body, 2)


@pytest.mark.parametrize("lengths", [[1], [1, 2, 3], [0, -2], [0, MAX_LENGTH + 1]])
def test_what_are_no_lengths_is_refused(lengths: list[int]) -> None:
    assert decode_lengths(array("q", [0, UNMEASURED]).tobytes(), 2) == [0, UNMEASURED]
    assert decode_lengths(b"", 0) == []
    with pytest.raises(WireError):
        decode_lengths(array("q", lengths).tobytes(), 2)


# -- chunks


def test_records_come_back_with_their_lengths_in_order(ready: Bench) -> None:
    first, second = span(lease(), 0, 3, values=[b"a", b"bb", b"ccc"]), span(lease(1), 0, 2, value=b"dddd")
    ready.add(first)
    ready.add(second)
    ready.process.answer()
    ready.process.answer()
    assert [it for _, it in ready.measured] == [first, second]
    assert ready.lengths() == [[1, 2, 3], [4, 4]]
    assert ready.measuring.size("text") == 0


def test_what_comes_while_the_process_has_enough_goes_together_with_the_next(ready: Bench) -> None:
    of = lease()
    for number in range(6):
        ready.add(span(of, number, 1))
    assert [len(it.values) for it in ready.process.asked] == [1, 1]
    assert ready.measuring.size("text") == 6
    ready.process.answer()
    assert [len(it.values) for it in ready.process.asked] == [1, 1, 4]


def test_a_chunk_is_bounded_in_records_and_in_bytes(ready: Bench) -> None:
    of = lease()
    ready.add(span(of, 0, 2 * MAX_CHUNK_RECORDS + 1))
    large = bytes(MAX_CHUNK_BYTES // 2)
    ready.add(span(of, 2 * MAX_CHUNK_RECORDS + 1, 5, value=large))
    while ready.process.held:
        ready.process.answer()
    sizes = [len(it.values) for it in ready.process.asked]
    assert sizes[:2] == [MAX_CHUNK_RECORDS] * 2
    assert max(sizes[2:]) <= 3  # the bytes of two, and the small one
    assert sum(sizes) == 2 * MAX_CHUNK_RECORDS + 6
    assert [it.first for _, it in ready.measured] == sorted(it.first for _, it in ready.measured)


def test_records_without_a_length_come_apart_from_the_others(ready: Bench) -> None:
    ready.add(span(lease(), 10, 6, values=[b"a", b"!", b"!!", b"bb", b"ccc", b"!"]))
    ready.process.answer(lambda value: f"why {value!r}" if b"!" in (value or b"") else len(value or b""))
    assert [(it.first, list(it.lengths or ())) for _, it in ready.measured] == [(10, [1]), (13, [2, 3])]
    failed = [(it.first, [failure.message for failure in why]) for _, it, why in ready.unmeasured]
    assert failed == [(11, ["why b'!'", "why b'!!'"]), (15, ["why b'!'"])]
    assert {(it.cause, it.stage, it.kind) for _, _, why in ready.unmeasured for it in why} == {
        (Cause.INVALID, "length", "Bad")
    }


def test_tasks_take_turns_by_age_and_a_held_one_waits(bench: Bench) -> None:
    bench.process.become_ready()
    bench.held = {"text"}
    bench.add(span(lease(), 0, 1, arrived_at=1.0), "text")
    bench.add(span(lease(), 1, 1, arrived_at=3.0), "text")
    bench.add(span(lease(1), 0, 1, arrived_at=2.0), "image")
    assert [it.task for it in bench.process.asked] == ["image"]
    bench.held = set()
    bench.process.answer()
    assert [it.task for it in bench.process.asked] == ["image", "text"]
    assert len(bench.process.asked[1].values) == 2


# -- deaths


def test_after_a_death_what_was_measured_and_what_was_queued_goes_again_as_it_was(ready: Bench) -> None:
    ready.add(span(lease(), 0, 3))
    ready.add(span(lease(), 3, 2))
    ready.die()
    assert [len(it.values) for it in ready.process.asked] == [3, 2]
    ready.process.answer()
    ready.process.answer()
    assert [it.first for _, it in ready.measured] == [0, 3]
    assert ready.restarts == ["killed"]


def test_the_record_that_kills_the_process_fails_alone(ready: Bench) -> None:
    values = [b"a", b"bb", b"poison", b"ccc"]
    ready.add(span(lease(), 0, 4, values=values))
    ready.add(span(lease(), 4, 1, value=b"late"))
    while ready.measuring.size("text"):
        if b"poison" in ready.process.held[0].values:
            ready.die(-signal.SIGSEGV)
        else:
            ready.process.answer()
    assert [it.first for _, it in ready.measured] == [0, 1, 3, 4]
    ((_, failed, (failure,)),) = ready.unmeasured
    assert failed.first == 2
    assert (failure.cause, failure.stage) == (Cause.CRASH, "length")
    assert "killed by SIGSEGV" in failure.message
    assert len(ready.restarts) == 4  # twice with the others, twice alone
    assert not ready.fatal


def test_a_record_that_hangs_fails_alone_after_two_deadlines(ready: Bench) -> None:
    ready.add(span(lease(), 0, 2, values=[b"slow", b"fast"]))
    for _ in range(2):
        while ready.process.held and b"slow" not in ready.process.held[0].values:
            ready.process.answer()
        ready.loop.advance(ready.settings.batch_timeout_s + 0.1)
        assert ready.process.killed
        ready.process.end()
        ready.loop.advance(1.0)
        ready.process.become_ready()
    ready.process.answer()
    assert [it.first for _, it in ready.measured] == [1]
    ((_, failed, (failure,)),) = ready.unmeasured
    assert failed.first == 0
    assert (failure.cause, failure.kind) == (Cause.TIMEOUT, "DeadlineExceeded")
    assert ready.restarts == ["deadline"] * 2


def test_the_deadline_begins_anew_where_this_process_stood_still(ready: Bench) -> None:
    ready.add(span(lease(), 0, 1))
    ready.loop.stand_still(ready.settings.batch_timeout_s + 60)
    assert not ready.process.killed
    ready.process.answer()
    assert ready.lengths() == [[2]]


def test_an_answer_that_was_written_before_the_death_counts(ready: Bench) -> None:
    ready.add(span(lease(), 0, 1))
    process = ready.process
    process.code.set_result(-signal.SIGKILL)  # its end is known before its last words are read
    process.answer()
    ready.loop.settle()
    ready.process.become_ready()
    assert ready.lengths() == [[2]]
    assert not ready.process.held


def test_a_process_that_dies_with_nothing_to_do_is_started_again_after_a_pause(ready: Bench) -> None:
    ready.process.end(1)
    assert len(ready.processes) == 1
    assert not ready.measuring.ready
    ready.loop.advance(ready.settings.restart_backoff_ms / 1_000)
    assert len(ready.processes) == 2
    assert ready.restarts == ["exited"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"what is printed to the socket",
        encode_frame(Kind.READY, {}),
        encode_frame(Kind.REPLY, {"id": 1}),
        encode_frame(Kind.LENGTHS, {"id": 2, "failures": []}, [bytes(8)], 8),
        encode_frame(Kind.LENGTHS, {"id": 1}, [bytes(8)], 8),
        encode_frame(Kind.LENGTHS, {"id": 1, "failures": []}, [bytes(16)], 16),
        encode_frame(Kind.LENGTHS, {"id": 1, "failures": [["a", "b"]]}, [bytes(8)], 8),
        encode_frame(Kind.LENGTHS, {"id": 1, "failures": [["a", 1]]}, [array("q", [UNMEASURED]).tobytes()], 8),
        encode_frame(Kind.LENGTHS, {"id": 1, "failures": ["ab"]}, [array("q", [UNMEASURED]).tobytes()], 8),
        encode_frame(Kind.LENGTHS, {"id": 1, "failures": []}, [array("q", [UNMEASURED]).tobytes()], 8),
        HEADER.pack(Kind.LENGTHS, b"spw", 2, 8 * MAX_CHUNK_RECORDS + 1),
    ],
)
def test_garbage_ends_the_process_and_loses_nothing(ready: Bench, garbage: bytes) -> None:
    ready.add(span(lease(), 0, 1))
    ready.process.send(garbage)
    assert ready.process.killed
    assert not ready.measured
    ready.add(span(lease(), 1, 1))
    assert len(ready.process.asked) == 1  # it gets nothing more
    ready.die()
    ready.process.answer()
    ready.process.answer()
    assert [it.first for _, it in ready.measured] == [0, 1]
    assert not ready.fatal


def test_a_process_that_closes_its_socket_and_lives_is_ended(ready: Bench) -> None:
    ready.loop.do(ready.process.disconnect)
    assert not ready.process.killed
    ready.loop.advance(0.5)
    assert ready.process.killed


# -- starts


def test_one_that_cannot_start_is_tried_again_and_at_last_given_up(bench: Bench) -> None:
    for _ in range(3):
        bench.process.say(Kind.START_FAILED, message="ValueError: no tokenizer", final=False)
        bench.process.end(1)
        bench.loop.advance(60.0)
    assert len(bench.processes) == 3
    assert bench.restarts == ["start_failed"] * 2
    (error,) = bench.fatal
    assert isinstance(error, WorkerStartError)
    assert str(error) == (
        "the process that measures lengths did not start, tried 3 times in a row: ValueError: no tokenizer"
    )


def test_one_whose_start_cannot_succeed_is_not_tried_again(bench: Bench) -> None:
    bench.process.say(Kind.START_FAILED, message="Text has no method length", final=True)
    bench.process.end(1)
    assert [str(it) for it in bench.fatal] == [
        "the process that measures lengths did not start: Text has no method length"
    ]


def test_one_that_takes_too_long_to_start_is_ended(bench: Bench) -> None:
    bench.loop.advance(bench.settings.initialize_timeout_s + 0.1)
    assert bench.process.killed
    bench.process.end()
    assert bench.restarts == ["start_failed"]


def test_records_wait_for_a_process_that_starts(bench: Bench) -> None:
    bench.add(span(lease(), 0, 2))
    assert not bench.process.asked
    bench.process.become_ready()
    bench.process.answer()
    assert bench.lengths() == [[2, 2]]


def test_stopping_ends_an_idle_process_kindly_and_a_busy_one_at_once(ready: Bench) -> None:
    ready.stop()
    assert ready.process.told_to_stop
    assert not ready.process.killed
    assert not ready.fatal


def test_stopping_does_not_wait_for_what_is_measured(ready: Bench) -> None:
    ready.add(span(lease(), 0, 2))
    ready.stop()
    assert ready.process.killed
    assert not ready.restarts


# -- discarding


def test_what_is_discarded_while_it_is_measured_is_in_no_answer(ready: Bench) -> None:
    staying, going = lease(0), lease(1)
    ready.add(span(staying, 0, 1))
    ready.add(span(going, 0, 2))
    ready.add(span(going, 2, 1))
    ready.add(span(staying, 1, 1))
    assert [it.first for it in ready.discard({going})] == [0, 2]
    assert ready.measuring.size("text") == 2
    while ready.process.held:
        ready.process.answer()
    assert [(it.lease, it.first) for _, it in ready.measured] == [(staying, 0), (staying, 1)]
    assert ready.measuring.size("text") == 0


def test_what_is_discarded_is_not_measured_again_after_a_death(ready: Bench) -> None:
    ready.add(span(lease(), 0, 1))
    ready.add(span(lease(), 1, 1))
    ready.discard()
    ready.die()
    assert not ready.process.asked


# -- reloads


def prepare(bench: Bench, **settings: Any) -> asyncio.Task[None]:
    """Begin a reload."""
    setup: dict[str, Any] = {"tasks": {"text": {}, "image": {}}}
    preparing = bench.loop.create_task(bench.measuring.prepare(bench.settings.model_copy(update=settings), setup))
    bench.loop.settle()
    return preparing


def test_a_reload_has_what_the_old_process_did_not_answer_measured_by_the_new_one(ready: Bench) -> None:
    old = ready.process
    for first in range(3):
        ready.add(span(lease(), first, 1, value=b"x" * (first + 1)))
    assert len(old.held) == CHUNKS_IN_PROCESS
    preparing = prepare(ready)
    old.answer()
    assert ready.lengths() == [[1]]
    new = ready.process
    assert new is not old
    new.become_ready()
    preparing.result()
    assert len(old.held) == CHUNKS_IN_PROCESS, "the old one goes on until the switch"
    ready.loop.do(ready.measuring.switch)
    assert old.killed
    while new.held:
        new.answer()
    assert ready.lengths() == [[1], [2], [3]]
    old.answer()
    old.end()
    ready.loop.advance(60)
    assert ready.lengths() == [[1], [2], [3]], "what it still says counts for nothing"
    assert (len(ready.processes), ready.restarts, ready.fatal) == (2, [], [])


def test_a_new_measuring_process_that_does_not_start_is_refused_and_the_old_one_stays(ready: Bench) -> None:
    old, preparing = ready.process, prepare(ready)
    ready.process.say(Kind.START_FAILED, message="no tokenizer", final=True)
    ready.process.end(1)
    with pytest.raises(ReloadRefusedError, match="measures lengths did not become ready: no tokenizer"):
        preparing.result()
    assert not ready.measuring.prepared
    ready.add(span(lease(), 0, 1, value=b"abc"))
    old.answer()
    assert (ready.lengths(), ready.restarts, ready.fatal) == ([[3]], [], [])


def test_a_new_measuring_process_that_dies_or_is_too_slow_is_not_prepared(ready: Bench) -> None:
    preparing = prepare(ready)
    ready.process.become_ready()
    preparing.result()
    assert ready.measuring.prepared
    ready.process.end()
    assert not ready.measuring.prepared
    preparing = prepare(ready, initialize_timeout_s=5)
    ready.loop.advance(5.1)
    assert ready.process.killed
    ready.process.end()
    with pytest.raises(ReloadRefusedError, match="it took more than 5 s"):
        preparing.result()
    preparing = prepare(ready)
    ready.stop()
    with pytest.raises(ReloadRefusedError, match="stopping"):
        preparing.result()


class AnyInterleaving(RuleBasedStateMachine):
    """Whatever is added, answered, dies, hangs, babbles and is revoked: nothing is lost, and nothing comes twice."""

    @initialize()
    def begin(self) -> None:
        self.bench = Bench(["text", "image"], start_attempts=1_000)
        self.leases = {task: [lease(number, topic=task) for number in range(2)] for task in ("text", "image")}
        self.next: dict[Lease, int] = {}
        self.values: dict[tuple[Lease, int], bytes] = {}
        self.gone: set[tuple[Lease, int]] = set()

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.finish()
            self.bench.close()

    @rule(
        task=st.sampled_from(["text", "image"]),
        which=st.integers(0, 1),
        values=st.lists(st.sampled_from([b"", b"a", b"bb", b"bad", b"poison", b"slow"]), min_size=1, max_size=6),
    )
    def add(self, task: str, which: int, values: list[bytes]) -> None:
        of = self.leases[task][which]
        first = self.next.get(of, 0)
        self.next[of] = first + len(values)
        for index, value in enumerate(values, first):
            self.values[of, index] = value
        self.bench.add(span(of, first, len(values), values=values, arrived_at=self.bench.loop.now), task)

    @rule(held=st.sets(st.sampled_from(["text", "image"])))
    def hold(self, held: set[str]) -> None:
        self.bench.held = held
        self.bench.loop.do(lambda: self.bench.measuring.send(held))

    @precondition(lambda self: self.bench.process.alive)
    @rule()
    def go_on(self) -> None:
        """The process does what it would: gets ready, answers, dies of poison, hangs."""
        process = self.bench.process
        if not self.bench.measuring.ready:
            if process.killed:
                process.end()
            elif not process.asked:
                process.become_ready()
        elif process.killed:
            process.end()
        elif process.held:
            if b"poison" in process.held[0].values:
                process.end(-signal.SIGSEGV)
            elif b"slow" in process.held[0].values:
                self.bench.loop.advance(self.bench.settings.batch_timeout_s + 0.1)
            else:
                process.answer(lambda value: "why" if value == b"bad" else len(value or b""))

    @precondition(lambda self: self.bench.process.alive)
    @rule()
    def die(self) -> None:
        self.bench.process.end()

    @precondition(lambda self: self.bench.process.alive and not self.bench.process.killed)
    @rule()
    def reload(self) -> None:
        preparing = prepare(self.bench)
        self.bench.process.become_ready()
        preparing.result()
        self.bench.loop.do(self.bench.measuring.switch)
        for process in self.bench.processes[:-1]:
            if process.alive:
                assert process.killed
                process.end()

    @rule(data=st.sampled_from([b"garbage, of more than a header", encode_frame(Kind.REPLY, {"id": 1})]))
    def babble(self, data: bytes) -> None:
        self.bench.process.send(data)

    @precondition(lambda self: self.bench.process.alive)
    @rule()
    def close_socket(self) -> None:
        self.bench.loop.do(self.bench.process.disconnect)
        self.bench.loop.advance(0.6)

    @rule()
    def pass_time(self) -> None:
        self.bench.loop.advance(40.0)

    @rule(task=st.sampled_from(["text", "image"]), which=st.integers(0, 2))
    def revoke(self, task: str, which: int) -> None:
        """One lease of a task, or all of them; new ones follow."""
        leases = self.leases[task][which : which + 1] or self.leases[task]
        given = self.bench.discard(set(leases), task)
        for it in given:
            assert it.lease in leases
            self._account(it)
        for of in leases:
            self.leases[task][of.partition.partition] = Lease(of.partition, of.epoch + 1)

    def _account(self, it: Span) -> None:
        for sequence in range(it.first, it.stop):
            assert (it.lease, sequence) not in self.gone, "it came twice"
            self.gone.add((it.lease, sequence))

    @invariant()
    def everything_that_comes_is_right(self) -> None:
        if not hasattr(self, "bench"):
            return
        bench = self.bench
        assert not bench.fatal
        for task, it in bench.measured:
            assert it.lease.partition.topic == task
            assert it.lengths == [len(self.values[it.lease, at]) for at in range(it.first, it.stop)]
            self._account(it)
        for task, it, failures in bench.unmeasured:
            assert it.lease.partition.topic == task
            assert len(failures) == len(it.records)
            for failure, at in zip(failures, range(it.first, it.stop), strict=True):
                self._judge(failure, self.values[it.lease, at])
            self._account(it)
        bench.measured.clear()
        bench.unmeasured.clear()
        waiting = sum(bench.measuring.size(task) for task in ("text", "image"))
        assert waiting == len(self.values) - len(self.gone), "something is lost"
        assert all(len(process.held) <= CHUNKS_IN_PROCESS for process in bench.processes)

    @staticmethod
    def _judge(failure: Failure, value: bytes) -> None:
        """An innocent record fails only where it was measured alone, and the process was killed each time."""
        if failure.cause is Cause.INVALID:
            assert value == b"bad"
        elif failure.cause is Cause.TIMEOUT:
            assert value == b"slow"
        else:
            assert failure.cause is Cause.CRASH

    def finish(self) -> None:
        """Left alone, it comes to its end with everything."""
        self.bench.held = set()
        self.bench.loop.do(self.bench.measuring.send)
        for _ in range(2_000):
            if len(self.gone) == len(self.values):
                return
            if self.bench.process.alive:
                self.go_on()
            else:
                self.bench.loop.advance(40.0)
            if self.bench.process.alive and not self.bench.process.connected:
                self.bench.process.end()
            self.everything_that_comes_is_right()
        raise AssertionError("it never comes to its end")


TestAnyInterleaving: Any = AnyInterleaving.TestCase
TestAnyInterleaving.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
