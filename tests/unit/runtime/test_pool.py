"""The pool's bookkeeping with played workers: every batch answered once, whatever happens in whatever order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamproc.errors import ReloadRefusedError, WorkerStartError
from streamproc.records import Batch, Cause
from streamproc.runtime.memory_limits import OutOfMemoryKills
from streamproc.runtime.pool import STOPPED_FOR_S, WATCH_MEMORY_EVERY_S
from streamproc.runtime.wire import BATCHES_PER_WORKER, Kind, Segment, encode_frame
from streamproc.settings import PoolSettings
from tests.support.fake_workers import FakeProcess, Stage
from tests.support.spans import batch, lease, span

TIMEOUT_S = 10.0
LIMIT_MB = 100
FAILED = {"cause": "exception", "stage": "execute", "kind": "ValueError", "message": "no", "traceback": ""}


GARBAGE = [
    b"printed where it should not be\n",
    encode_frame(Kind.REPLY, {"id": 10**6}),
    encode_frame(Kind.FAILED, {"id": 10**6, "failure": FAILED}),
    encode_frame(Kind.BATCH, {}),
]


def make(number: int) -> Batch:
    return batch([span(lease(), number, 1)], number=number)


@pytest.fixture
def stage() -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make_stage(**options: Any) -> Stage:
        made.append(Stage(batch_timeout_s=TIMEOUT_S, **options))
        return made[-1]

    yield make_stage
    for it in made:
        it.stop()
        it.close()


def test_a_batch_past_its_deadline_is_stopped_and_the_one_behind_it_was_not_executed(
    stage: Callable[..., Stage],
) -> None:
    it = stage()
    it.open()
    (worker,) = it.processes
    worker.become_ready()
    it.submit(make(1))
    it.submit(make(2))
    it.loop.advance(TIMEOUT_S - 0.01)
    assert not worker.killed
    it.loop.advance(0.02)
    assert worker.killed
    worker.end()
    assert [(b.id, failure.cause, executed) for b, failure, executed, _ in it.failures] == [
        (1, Cause.TIMEOUT, True),
        (2, Cause.TIMEOUT, False),
    ]
    assert it.restarts == ["deadline"]


def test_a_deadline_that_comes_late_since_this_process_stood_still_begins_anew(stage: Callable[..., Stage]) -> None:
    it = stage()
    it.open()
    (worker,) = it.processes
    worker.become_ready()
    it.submit(make(1))
    it.loop.stand_still(TIMEOUT_S + STOPPED_FOR_S + 0.5)
    assert not worker.killed, "its answer may be in the socket"
    worker.answer()
    assert it.replies == [1]
    it.submit(make(2))
    it.loop.stand_still(TIMEOUT_S * 100)
    it.loop.advance(TIMEOUT_S - 0.01)
    assert not worker.killed, "it may have been stopped as well"
    it.loop.advance(0.02)
    assert worker.killed, "the new deadline holds"


def test_a_worker_that_initializes_is_not_blamed_for_our_own_pause_either(stage: Callable[..., Stage]) -> None:
    it = stage(initialize_timeout_s=5)
    it.open()
    (worker,) = it.processes
    it.loop.stand_still(60)
    assert not worker.killed
    it.loop.advance(5.1)
    assert worker.killed


def test_a_worker_above_its_memory_limit_is_stopped_and_the_sentence_has_both_figures(
    stage: Callable[..., Stage],
) -> None:
    it = stage(max_worker_memory_mb=LIMIT_MB)
    it.open()
    (worker,) = it.processes
    worker.become_ready()
    it.submit(make(1))
    worker.memory_bytes = LIMIT_MB << 20
    it.loop.advance(WATCH_MEMORY_EVERY_S * 3)
    assert not worker.killed
    worker.memory_bytes = 137 << 20
    it.loop.advance(WATCH_MEMORY_EVERY_S)
    assert worker.killed
    worker.end()
    ((_, failure, executed, _),) = it.failures
    assert (failure.cause, failure.stage, failure.kind, executed) == (Cause.OOM, "worker", "OutOfMemory", True)
    assert "137 MiB, more than pool.max_worker_memory_mb (100) allows" in failure.message
    assert it.restarts == ["oom"]


def test_memory_is_looked_at_only_while_a_worker_computes_and_a_limit_is_set(stage: Callable[..., Stage]) -> None:
    it = stage(max_worker_memory_mb=LIMIT_MB)
    it.open()
    (worker,) = it.processes
    worker.become_ready()
    it.loop.advance(5)
    assert worker.looked_at == 1, "once, when it was initialized"
    it.submit(make(1))
    it.loop.advance(1.05)
    assert worker.looked_at == 11
    worker.answer()
    it.loop.advance(5)
    assert worker.looked_at == 11
    assert it.loop.timers() == 0
    free = stage()
    free.open()
    free.processes[0].become_ready()
    free.submit(make(1))
    free.loop.advance(1)
    assert free.processes[0].looked_at == 0


def test_a_limit_below_what_the_model_takes_stops_the_processor_and_fails_no_record(
    stage: Callable[..., Stage],
) -> None:
    it = stage(max_worker_memory_mb=LIMIT_MB)
    it.open()
    (worker,) = it.processes
    worker.memory_bytes = 300 << 20
    worker.become_ready()
    assert it.pool.room() == 0
    worker.end()
    (error,) = it.fatal
    assert isinstance(error, WorkerStartError)
    assert "once initialized, it held 300 MiB, more than pool.max_worker_memory_mb (100) allows; raise it" in str(error)


@pytest.mark.parametrize(
    "garbage",
    [
        *GARBAGE,
        encode_frame(Kind.REPLY, {"id": 2}),
        encode_frame(Kind.REPLY, {"id": 1}),
        encode_frame(Kind.REPLY, {"id": 1, "shared": 4_096, "slot": 0}),
        encode_frame(Kind.FAILED, {"id": 1}),
        encode_frame(Kind.FAILED, {"id": 1, "failure": FAILED | {"cause": "bad luck"}}),
        encode_frame(Kind.FAILED, {"id": 1, "failure": "bad luck"}),
    ],
)
def test_garbage_ends_the_worker_and_costs_its_running_batch_one_execution_and_its_queued_batch_none(
    stage: Callable[..., Stage], garbage: bytes
) -> None:
    it = stage()
    it.open()
    (worker,) = it.processes
    worker.segments.extend(Segment.create() for _ in range(2 * BATCHES_PER_WORKER))
    worker.become_ready()
    it.submit(make(1))
    it.submit(make(2))
    worker.send(garbage)
    assert worker.killed
    assert it.pool.room() == 0
    worker.answer()
    assert it.replies == [], "an answer after garbage"
    worker.end()
    assert [(b.id, failure.cause, failure.kind, executed) for b, failure, executed, _ in it.failures] == [
        (1, Cause.CRASH, "WorkerDied", True),
        (2, Cause.CRASH, "WorkerDied", False),
    ]
    assert "its answers cannot be understood: " in it.failures[0][1].message
    assert it.restarts == ["killed"]
    assert it.fatal == []


def test_a_kill_that_the_kernel_counts_is_out_of_memory_and_explains_one_death(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text("oom 3\noom_kill 3\n")
    it = stage(workers=2)
    it.open(kills=OutOfMemoryKills(counter))
    for number, worker in enumerate(list(it.processes)):
        worker.become_ready()
        it.submit(make(number))
    counter.write_text("oom 4\noom_kill 4\n")
    first, second = it.processes
    first.end()
    second.end()
    assert [failure.cause for _, failure, _, _ in it.failures] == [Cause.OOM, Cause.CRASH]
    assert "control group ran out of memory" in it.failures[0][1].message
    assert it.restarts == ["oom", "killed"]


def test_an_end_that_is_no_kill_is_a_crash_whatever_the_kernel_counts(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text("oom_kill 0\n")
    it = stage()
    it.open(kills=OutOfMemoryKills(counter))
    it.processes[0].become_ready()
    it.submit(make(1))
    counter.write_text("oom_kill 1\n")
    it.processes[0].end(-signal.SIGSEGV)
    assert [failure.cause for _, failure, _, _ in it.failures] == [Cause.CRASH]


def test_a_kill_that_was_noted_long_ago_explains_nothing(stage: Callable[..., Stage], tmp_path: Path) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text("oom_kill 0\n")
    it = stage()
    it.open(kills=OutOfMemoryKills(counter))
    it.processes[0].become_ready()
    counter.write_text("oom_kill 1\n")
    it.pool.look_for_kills()
    it.loop.advance(60)
    it.submit(make(1))
    it.processes[0].end()
    assert [failure.cause for _, failure, _, _ in it.failures] == [Cause.CRASH]


def prepare(it: Stage, **settings: Any) -> asyncio.Task[None]:
    """Begin a reload with these settings; what it has been told to start is started."""
    new = PoolSettings.model_validate({"batch_timeout_s": TIMEOUT_S, "start_attempts": 1_000, **settings})
    preparing = it.loop.create_task(it.pool.prepare(new, {}))
    it.loop.settle()
    return preparing


def test_a_reload_gives_the_new_workers_everything_once_all_are_ready_and_the_old_ones_finish(
    stage: Callable[..., Stage],
) -> None:
    it = stage(workers=2)
    pool = it.open()
    old = list(it.processes)
    for worker in old:
        worker.become_ready()
    for number in (1, 2, 3):
        it.submit(make(number))
    preparing = prepare(it, workers=2)
    assert len(it.processes) == 3, "one goes ahead: a version that does not load costs one process"
    first = it.processes[2]
    first.become_ready()
    assert len(it.processes) == 4
    assert not preparing.done()
    it.submit(make(4))
    assert sorted(number for worker in old for number in worker.held) == [1, 2, 3, 4]
    it.processes[3].become_ready()
    assert preparing.done()
    it.loop.do(pool.switch)
    assert (pool.generation, pool.idle(), pool.room()) == (2, 2, 4)
    fifth = make(5)
    it.submit(fifth)
    assert (fifth.generation, sum(len(worker.held) for worker in it.processes[2:])) == (2, 1)
    for worker in old:
        assert not worker.told_to_stop
        while worker.held:
            worker.answer()
        assert worker.told_to_stop
        assert not worker.killed
        worker.end(0)
    assert sorted(it.replies) == [1, 2, 3, 4]
    assert (it.failures, it.restarts) == ([], []), "a reload is no restart"


def test_a_version_that_does_not_start_is_refused_with_its_reason_and_nothing_changes(
    stage: Callable[..., Stage],
) -> None:
    it = stage(workers=2)
    pool = it.open()
    for worker in list(it.processes):
        worker.become_ready()
    preparing = prepare(it, workers=2)
    it.processes[2].say(Kind.START_FAILED, message="no module named torhc", final=True)
    it.processes[2].end(1)
    with pytest.raises(ReloadRefusedError, match="its worker 0 did not become ready: no module named torhc"):
        preparing.result()
    assert len(it.processes) == 3, "the second one was not even tried"
    assert (pool.generation, pool.idle(), it.fatal, it.restarts) == (1, 2, [], [])


def test_a_new_worker_that_dies_while_others_load_takes_the_reload_with_it(stage: Callable[..., Stage]) -> None:
    it = stage()
    pool = it.open()
    it.processes[0].become_ready()
    preparing = prepare(it, workers=3)
    it.processes[1].become_ready()
    it.processes[2].become_ready()
    it.processes[1].end()
    with pytest.raises(ReloadRefusedError, match="its worker 0 did not become ready: killed by SIGKILL"):
        preparing.result()
    assert all(process.killed for process in it.processes[2:])
    with pytest.raises(ReloadRefusedError, match="SIGKILL"):
        it.loop.do(pool.switch)
    assert (pool.generation, pool.idle()) == (1, 1)


def test_a_new_worker_has_as_long_as_it_may_initialize_until_its_backend_is_ready(stage: Callable[..., Stage]) -> None:
    it = stage()
    it.open()
    it.processes[0].become_ready()
    preparing = prepare(it, initialize_timeout_s=5)
    it.processes[1].become_ready(False)
    it.loop.advance(4.9)
    assert not preparing.done()
    it.loop.advance(0.2)
    assert it.processes[1].killed
    it.processes[1].end()
    with pytest.raises(ReloadRefusedError, match="initialize timed out"):
        preparing.result()


def test_a_pool_that_never_started_counts_as_initialized_once_a_reload_is_taken(stage: Callable[..., Stage]) -> None:
    it = stage()
    pool = it.open()
    preparing = prepare(it)
    it.processes[1].become_ready()
    preparing.result()
    assert not pool.initialized.is_set(), "the group is not joined for what may still be refused"
    it.loop.do(pool.switch)
    assert pool.initialized.is_set()


def test_a_reload_can_change_how_many_workers_there_are(stage: Callable[..., Stage]) -> None:
    it = stage(workers=3)
    pool = it.open()
    old = list(it.processes)
    old[0].become_ready()
    preparing = prepare(it, workers=1)
    it.processes[3].become_ready()
    preparing.result()
    it.loop.do(pool.switch)
    assert old[0].told_to_stop
    assert all(worker.killed for worker in old[1:]), "they were still starting, and would read nothing"
    for worker in old:
        worker.end()
    assert (pool.idle(), len(pool.workers()), len(it.processes)) == (1, 1, 4)


@pytest.mark.parametrize("trouble", ["lost", "not ready", "garbage"])
def test_new_workers_that_are_not_ready_any_more_at_the_switch_do_not_take_over(
    stage: Callable[..., Stage], trouble: str
) -> None:
    it = stage()
    pool = it.open()
    it.processes[0].become_ready()
    preparing = prepare(it)
    new = it.processes[1]
    new.become_ready()
    preparing.result()
    if trouble == "lost":
        new.lose_socket()
    elif trouble == "garbage":
        new.babble(b"printed where it should not be\n")
    else:
        new.become_ready(False)
        new.become_ready()
    with pytest.raises(ReloadRefusedError, match="ready"):
        it.loop.do(pool.switch)
    assert new.killed
    assert (pool.generation, pool.idle()) == (1, 1)
    new.end()
    assert (len(it.processes), it.fatal) == (2, [])


def test_a_recycling_that_was_under_way_ends_with_the_generation_that_it_was_for(stage: Callable[..., Stage]) -> None:
    it = stage(recycle={"max_batches": 1})
    pool = it.open()
    it.processes[0].become_ready()
    it.submit(make(1))
    it.processes[0].answer()
    assert len(it.processes) == 2, "its successor"
    preparing = prepare(it)
    it.processes[2].become_ready()
    preparing.result()
    it.loop.do(pool.switch)
    assert it.processes[1].killed
    it.processes[1].end()
    it.processes[0].end(0)
    it.loop.advance(120)
    assert (len(it.processes), pool.idle(), it.restarts) == (3, 1, [])


def test_while_a_reload_is_under_way_no_worker_is_recycled(stage: Callable[..., Stage]) -> None:
    it = stage(recycle={"max_batches": 1})
    pool = it.open()
    it.processes[0].become_ready()
    preparing = prepare(it)
    it.submit(make(1))
    it.processes[0].answer()
    assert len(it.processes) == 2, "two at once are enough"
    it.processes[1].become_ready()
    preparing.result()
    it.loop.do(pool.switch)
    assert it.processes[0].told_to_stop


def generation_of(process: FakeProcess) -> int:
    return int(process.settings.env.get("GENERATION", 1))


class Seat:
    """The place of one worker: who takes its batches, and who is to take over."""

    def __init__(self) -> None:
        self.current: FakeProcess | None = None
        self.successor: FakeProcess | None = None


class PoolMachine(RuleBasedStateMachine):
    """Anything that workers, timers, reloads and this process's own pauses can do to the pool, in any order.

    The model is what the played workers hold, who sits on which seat, and who is to sit there after a reload; it knows
    nothing of the pool's own books. A worker's generation is known by the settings that it was started with.
    """

    stage: Stage

    @initialize(
        workers=st.integers(1, 3),
        max_batches=st.sampled_from([None, 1, 3]),
        limit_mb=st.sampled_from([None, LIMIT_MB]),
        backoff_ms=st.sampled_from([0, 200]),
    )
    def begin(self, workers: int, max_batches: int | None, limit_mb: int | None, backoff_ms: int) -> None:
        self.options: dict[str, Any] = {
            "batch_timeout_s": TIMEOUT_S,
            "initialize_timeout_s": 60,
            "start_attempts": 1_000,
            "restart_backoff_ms": backoff_ms,
            "max_worker_memory_mb": limit_mb,
            "recycle": {"max_batches": max_batches},
        }
        self.seats = [Seat() for _ in range(workers)]
        self.generation = 1
        self.candidates: dict[int, FakeProcess] = {}
        self.spoiled = False
        self.preparing: asyncio.Task[None] | None = None
        self.stage = Stage(workers=workers, **self.options)
        self.submitted: dict[int, Batch] = {}
        self.answered: set[int] = set()
        self.expected_executed: dict[int, bool] = {}
        self.stage.on_launch = self._on_launch
        self.stage.events.on_reply = lambda reply: self._on_answer(reply.batch, executed=True)
        self.stage.events.on_failed = lambda it, _, executed, __: self._on_answer(it, executed=executed)
        self.pool = self.stage.open()
        self.room_before = 0
        self.rooms_before = 0

    # -- the model

    def _on_launch(self, process: FakeProcess) -> None:
        if generation_of(process) > self.generation:
            assert process.index not in self.candidates, "two candidates for one seat"
            self.candidates[process.index] = process
            return
        seat = self.seats[process.index]
        if seat.current is None:
            seat.current = process
        else:
            assert seat.successor is None, "two successors of one worker"
            seat.successor = process

    def _on_answer(self, it: Batch, *, executed: bool) -> None:
        assert it.id in self.submitted, "never submitted"
        assert it.id not in self.answered, "answered twice"
        self.answered.add(it.id)
        assert executed == self.expected_executed.pop(it.id)

    def _open(self) -> list[FakeProcess]:
        sitting = [seat.current for seat in self.seats]
        return [it for it in sitting if it is not None and it.alive and it.ready and it.connected]

    def _alive(self) -> list[FakeProcess]:
        return [it for it in self.stage.processes if it.alive]

    def _end(self, process: FakeProcess, code: int) -> None:
        for position, number in enumerate(process.held):
            self.expected_executed[number] = position == 0
        process.held.clear()
        for seat in self.seats:
            if process is seat.current:
                seat.current, seat.successor = seat.successor, None
            elif process is seat.successor:
                seat.successor = None
        self.spoiled |= process in self.candidates.values()
        process.end(code)
        self._reload_goes_on()

    def _say_ready(self, process: FakeProcess, ready: bool) -> None:
        for seat in self.seats:
            if ready and process is seat.successor:
                assert seat.current is not None
                seat.current.retired = True
                seat.current, seat.successor = process, None
        self.spoiled |= process in self.candidates.values() and process.ready and not ready
        process.become_ready(ready)
        self._reload_goes_on()

    def _reload_goes_on(self) -> None:
        """A reload that is refused leaves no new worker; nothing else ends one before the switch."""
        if self.preparing is None or not self.preparing.done() or self.preparing.exception() is None:
            return
        assert isinstance(self.preparing.exception(), ReloadRefusedError)
        self._candidates_are_gone()

    def _candidates_are_gone(self) -> None:
        assert all(it.killed for it in self.candidates.values() if it.alive)
        self.candidates, self.preparing, self.spoiled = {}, None, False

    def _pick(self, data: st.DataObject, processes: list[FakeProcess]) -> FakeProcess:
        return data.draw(st.sampled_from(processes), label="worker")

    # -- what can happen

    @rule(data=st.data(), ready=st.booleans())
    @precondition(lambda self: any(it.heard for it in self._alive()))
    def a_worker_says_whether_it_is_ready(self, data: st.DataObject, ready: bool) -> None:
        self._say_ready(self._pick(data, [it for it in self._alive() if it.heard]), ready)

    @rule()
    @precondition(lambda self: self.pool.room() > 0)
    def a_batch_is_submitted(self) -> None:
        it = make(len(self.submitted) + 1)
        self.submitted[it.id] = it
        self.stage.submit(it)
        (holder,) = [process for process in self._alive() if it.id in process.held]
        assert it.generation == generation_of(holder) == self.generation

    @rule(workers=st.integers(1, 3))
    @precondition(lambda self: self.preparing is None)
    def a_reload_begins(self, workers: int) -> None:
        name = {"GENERATION": str(self.generation + 1)}
        settings = PoolSettings.model_validate({**self.options, "workers": workers, "env": name})
        self.workers_next = workers
        self.preparing = self.stage.loop.create_task(self.pool.prepare(settings, {}))
        self.stage.loop.settle()
        self._reload_goes_on()

    @rule()
    @precondition(lambda self: self.preparing is not None and not self.preparing.done())
    def the_new_workers_become_ready(self) -> None:
        for _ in range(self.workers_next):
            for process in list(self.candidates.values()):
                if process.heard and not process.ready:
                    self._say_ready(process, True)

    @rule()
    @precondition(lambda self: self.preparing is not None and self.preparing.done())
    def the_new_workers_take_over(self) -> None:
        self._switch()

    def _switch(self) -> None:
        candidates = self.candidates
        assert sorted(candidates) == list(range(self.workers_next))
        if self.spoiled or not all(it.alive and it.ready and it.connected for it in candidates.values()):
            with pytest.raises(ReloadRefusedError):
                self.stage.loop.do(self.pool.switch)
            self._candidates_are_gone()
            return
        outgoing = [process for seat in self.seats for process in (seat.current, seat.successor) if process is not None]
        self.stage.loop.do(self.pool.switch)
        assert all(it.held or it.told_to_stop or it.killed for it in outgoing)
        self.generation += 1
        self.seats = [Seat() for _ in candidates]
        for index, process in candidates.items():
            self.seats[index].current = process
        self.candidates, self.preparing, self.spoiled = {}, None, False

    @rule(data=st.data(), failed=st.booleans())
    @precondition(lambda self: any(it.held and it.heard for it in self._alive()))
    def a_worker_answers(self, data: st.DataObject, failed: bool) -> None:
        process = self._pick(data, [it for it in self._alive() if it.held and it.heard])
        self.expected_executed[process.held[0]] = True
        process.answer(FAILED if failed else None)

    @rule(data=st.data(), code=st.sampled_from([-9, -11, 3, 0]))
    def a_worker_ends(self, data: st.DataObject, code: int) -> None:
        if alive := self._alive():
            self._end(self._pick(data, alive), code)

    @rule()
    def the_killed_are_gone(self) -> None:
        for process in self._alive():
            if process.killed:
                self._end(process, -signal.SIGKILL)

    @rule()
    def those_that_were_told_to_stop_do(self) -> None:
        for process in self._alive():
            if process.told_to_stop:
                self._end(process, 0)

    @rule(data=st.data())
    @precondition(lambda self: any(it.connected for it in self._alive()))
    def a_worker_closes_its_socket(self, data: st.DataObject) -> None:
        process = self._pick(data, [it for it in self._alive() if it.connected])
        process.lose_socket()

    @rule(data=st.data(), garbage=st.sampled_from(GARBAGE))
    @precondition(lambda self: any(it.heard for it in self._alive()))
    def a_worker_writes_garbage(self, data: st.DataObject, garbage: bytes) -> None:
        process = self._pick(data, [it for it in self._alive() if it.heard])
        process.babble(garbage)
        assert process.killed

    @rule(data=st.data())
    @precondition(lambda self: any(it.initialized for it in self._alive()))
    def a_worker_takes_more_memory(self, data: st.DataObject) -> None:
        self._pick(data, [it for it in self._alive() if it.initialized]).memory_bytes = 2 * LIMIT_MB << 20

    @rule()
    @precondition(lambda self: self.stage.launches_to_fail < 3)
    def the_next_process_cannot_be_started(self) -> None:
        self.stage.launches_to_fail += 1

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0, TIMEOUT_S, 65.0]))
    def time_passes(self, seconds: float) -> None:
        self.stage.loop.advance(seconds)

    @rule(seconds=st.sampled_from([0.5, 20.0, 3_600.0]))
    def this_process_stands_still(self, seconds: float) -> None:
        self.stage.loop.stand_still(seconds)

    # -- what has to hold

    @invariant()
    def a_reload_ends_only_as_the_new_workers_let_it(self) -> None:
        self._reload_goes_on()
        if self.preparing is not None:
            ready = [it for it in self.candidates.values() if it.alive and it.initialized]
            assert self.preparing.done() or len(ready) < self.workers_next or not all(it.ready for it in ready)

    @invariant()
    def a_worker_holds_one_running_and_one_queued_at_most(self) -> None:
        assert all(it.most_held <= BATCHES_PER_WORKER for it in self.stage.processes)

    @invariant()
    def room_and_idleness_are_told_as_they_are(self) -> None:
        places = self._open()
        assert self.pool.room() == sum(BATCHES_PER_WORKER - len(it.held) for it in places)
        assert self.pool.idle() == sum(not it.held for it in places)

    @invariant()
    def whoever_waits_for_room_is_told_of_it(self) -> None:
        room, rooms = self.pool.room(), self.stage.rooms
        assert room <= self.room_before or rooms > self.rooms_before
        self.room_before, self.rooms_before = room, rooms

    @invariant()
    def a_batch_is_answered_or_held_by_one_worker(self) -> None:
        held = [number for it in self._alive() for number in it.held]
        assert sorted([*held, *self.answered]) == sorted(self.submitted)
        assert not self.expected_executed

    @invariant()
    def nothing_is_fatal(self) -> None:
        assert self.stage.fatal == []

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        try:
            self._everything_recovers()
            self._it_stops()
        finally:
            self.stage.close()

    def _everything_recovers(self) -> None:
        """Whatever happened: once the workers behave, every batch is answered, and every worker is back."""
        for _ in range(20):
            for process in self._alive():
                if process.killed or process.told_to_stop or not process.connected:
                    self._end(process, -signal.SIGKILL)
                    continue
                process.memory_bytes = 1_000_000
                if not process.ready:
                    self._say_ready(process, True)
                while process.held:
                    self.expected_executed[process.held[0]] = True
                    process.answer()
            self.stage.loop.advance(31)
            self._reload_goes_on()
            if self.preparing is not None and self.preparing.done():
                self._switch()
            if self.pool.idle() == len(self.seats) and self.answered == set(self.submitted):
                return
        raise AssertionError("a worker never comes back")

    def _it_stops(self) -> None:
        told = len(self.answered)
        self.stage.stop()
        if self.preparing is not None:
            assert self.preparing.done(), "whoever waits for a reload is told that it ends"
            self.preparing.exception()
        assert len(self.answered) == told
        self.stage.loop.advance(60)
        assert self.stage.loop.timers() == 0, "something goes on"


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("declared", [3, [], {"text": 3}, {"text": {"input": "object"}}])
def test_schemas_that_are_none_are_garbage(stage: Callable[..., Stage], declared: Any) -> None:
    it = stage()
    it.open()
    (worker,) = it.processes
    worker.say(Kind.READY, initialize_s=0.5, declared=declared)
    assert worker.killed
    assert it.pool.declared == {}


def test_what_a_backend_declares_is_known_of_the_version_in_force(stage: Callable[..., Stage]) -> None:
    it = stage()
    it.open()
    (worker,) = it.processes
    worker.say(Kind.READY, initialize_s=0.5, declared={"text": {"input": {"type": "object"}}})
    assert it.pool.declared == {"text": {"input": {"type": "object"}}}
