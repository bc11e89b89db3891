"""The pool with real worker processes: what they answer, how they die, and that every batch is answered once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest
import yaml

from streamproc.errors import StreamprocError, WorkerStartError
from streamproc.records import Batch, Failure, Span, Status, value_sizes
from streamproc.runtime.failures import decode_failure
from streamproc.runtime.pool import Pool, PoolEvents, Reply
from streamproc.runtime.wire import Kind, encode_frame
from streamproc.settings import PoolSettings
from tests.support.asyncs import until
from tests.support.spans import FakeRecord, batch, lease

TESTS = Path(__file__).parents[2]


@dataclass
class Seen:
    replies: list[Reply] = field(default_factory=list)
    failures: list[tuple[Batch, Failure, bool]] = field(default_factory=list)
    restarts: list[str] = field(default_factory=list)
    fatal: list[StreamprocError] = field(default_factory=list)

    def answered(self) -> int:
        return len(self.replies) + len(self.failures)


@contextlib.asynccontextmanager
async def running_pool(backend: str = "Scripted", **options: Any) -> AsyncIterator[tuple[Pool, Seen]]:
    seen = Seen()
    path = backend if ":" in backend else f"tests.support.backends:{backend}"
    setup = {
        "backend": {
            "path": path,
            "loader": "local",
            "base_dir": str(TESTS),
            "config": yaml.safe_dump(options.pop("config", {})),
        },
        "tasks": {
            "text": {
                "schemas": options.pop("schemas", {}),
                "envelope": "result",
                "max_value_bytes": 2_000_000,
                "warmup": [],
            }
        },
        "shared_memory_threshold_bytes": options.get("shared_memory_threshold_bytes", 262_144),
        "logging": {"level": "error", "format": "json"},
    }
    events = PoolEvents(
        on_reply=seen.replies.append,
        on_failed=lambda batch, failure, executed, _: seen.failures.append((batch, failure, executed)),
        on_room=lambda: None,
        on_restart=seen.restarts.append,
        on_fatal=seen.fatal.append,
    )
    settings = PoolSettings.model_validate({"restart_backoff_ms": 10, **options})
    pool = Pool(settings, setup, events, time.monotonic)
    await pool.start()
    try:
        yield pool, seen
    finally:
        await pool.stop()


def make(number: int, records: Sequence[dict[str, Any] | bytes | None]) -> Batch:
    rows = [
        FakeRecord(offset=index, value=it if it is None or isinstance(it, bytes) else orjson.dumps(it))
        for index, it in enumerate(records)
    ]
    return batch([Span(lease(), 0, rows, value_sizes(rows), time.monotonic())], number=number)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def results(reply: Reply) -> list[Any]:
    return [
        orjson.loads(value) if status == Status.RESULT else decode_failure(value).kind
        for status, value in zip(reply.statuses, reply.values, strict=True)
    ]


def test_a_batch_comes_back_with_a_result_for_each_record_and_the_metrics() -> None:
    async def test() -> None:
        async with running_pool("Identity") as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            pool.submit(make(1, [{"id": 1}, {"id": 2}]))
            await until(lambda: seen.answered() == 1, "the batch is answered")
            (reply,) = seen.replies
            assert results(reply) == [{"id": 1}, {"id": 2}]
            assert reply.metrics["batch_size"] == 2
            assert set(reply.metrics) == {"batch_size", "execution_times", "total_execution_time", "queue_time"}
            assert reply.metrics["execution_times"]["transform_inputs"] is None
            assert reply.metrics["queue_time"] >= 0

    run(test)


def test_bad_records_fail_alone_and_the_backend_sees_the_others_only() -> None:
    async def test() -> None:
        schema = {"in": {"type": "object", "properties": {"id": {"type": "integer"}}}}
        async with running_pool(schemas=schema) as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            bad: list[dict[str, Any] | bytes | None] = [
                {"id": 1},
                b"{",
                None,
                {"id": "one"},
                {"id": 2, "do": "refuse"},
                {"id": 3, "do": "list"},
                {"id": 4, "do": "object"},
                {"id": 5},
            ]
            pool.submit(make(1, bad))
            await until(lambda: seen.answered() == 1, "the batch is answered")
            found = results(seen.replies[0])
            assert [it["id"] for it in (found[0], found[-1])] == [1, 5]
            assert found[1:-1] == [
                *("InvalidJSON", "NullValue", "SchemaViolation", "RecordError", "NotAnObject", "TypeError"),
            ]
            assert seen.replies[0].metrics["batch_size"] == 5

    run(test)


def test_large_batches_and_results_cross_shared_memory_unharmed() -> None:
    async def test() -> None:
        async with running_pool("Identity", shared_memory_threshold_bytes=1_000) as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            sizes = [10, 2_000, 500_000, 3_000, 1_000_000, 5]
            for number, size in enumerate(sizes, 1):
                await until(lambda: pool.room() > 0, "there is room")
                pool.submit(make(number, [{"id": number, "x": chr(64 + number) * size}]))
            await until(lambda: seen.answered() == len(sizes), "all are answered")
            for number, size in enumerate(sizes, 1):
                assert results(seen.replies[number - 1]) == [{"id": number, "x": chr(64 + number) * size}]

    run(test)


@pytest.mark.parametrize(
    ("action", "cause", "kind", "stage"),
    [
        ("raise", "exception", "ValueError", "execute"),
        ("memory", "oom", "MemoryError", "execute"),
        ("device", "oom", "RuntimeError", "execute"),
        ("omit", "output", "WrongOutputCount", "output"),
        ("die", "crash", "WorkerDied", "worker"),
        ("exit", "crash", "WorkerDied", "worker"),
    ],
)
def test_a_batch_that_fails_comes_back_with_the_cause(action: str, cause: str, kind: str, stage: str) -> None:
    async def test() -> None:
        async with running_pool() as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            pool.submit(make(1, [{"id": 1}, {"id": 2, "do": action}]))
            await until(lambda: seen.answered() == 1, "the batch is answered")
            ((failed, failure, executed),) = seen.failures
            assert (failed.id, failure.cause, failure.kind, failure.stage, executed) == (1, cause, kind, stage, True)
            assert len(seen.restarts) == (stage == "worker"), "a worker whose backend raised lives on"
            await until(lambda: pool.idle() == 1, "a worker is ready again")
            pool.submit(make(2, [{"id": 3}]))
            await until(lambda: seen.answered() == 2, "the next batch is answered")
            assert len(seen.replies) == 1

    run(test)


def test_the_traceback_of_what_the_backend_raised_comes_along_and_is_bounded() -> None:
    async def test() -> None:
        async with running_pool() as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            pool.submit(make(1, [{"id": 7, "do": "raise"}]))
            pool.submit(make(2, [{"id": 8, "do": "nest", "depth": 40, "why": "é" * 5_000}]))
            await until(lambda: seen.answered() == 2, "both are answered")
            raised, nested = (failure.traceback for _, failure, _ in seen.failures)
            lines = raised.splitlines()
            assert lines[-1] == "ValueError: record 7 is at fault"
            assert lines[-2].strip() == """raise ValueError(f"record {record['id']} is at fault")"""
            assert re.fullmatch(r'  File "tests/support/backends.py", line \d+, in _raise', lines[-3])
            assert not [line for line in lines if "pipeline.py" in line], "only the user's own frames"
            assert len(nested.splitlines()) <= 10
            assert 2_000 < len(nested.encode()) <= 2_048
            assert nested.endswith("é")

    run(test)


@pytest.mark.parametrize(
    "text",
    [
        "a line that belongs on standard error, printed into the socket\n",
        encode_frame(Kind.REPLY, {"id": 1}).decode(),
        encode_frame(Kind.REPLY, {"id": 2}).decode(),
        encode_frame(Kind.FAILED, {"id": 1}).decode(),
        encode_frame(Kind.READY, {}).decode()[:-1],
    ],
)
def test_a_worker_whose_code_writes_to_its_socket_is_replaced_and_its_batches_are_answered_once(text: str) -> None:
    async def test() -> None:
        async with running_pool() as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            pool.submit(make(1, [{"id": 1, "do": "print", "text": text}]))
            pool.submit(make(2, [{"id": 2}]))
            await until(lambda: seen.answered() == 2, "both are answered")
            assert [(it.id, failure.cause, failure.kind, executed) for it, failure, executed in seen.failures] == [
                (1, "crash", "WorkerDied", True),
                (2, "crash", "WorkerDied", False),
            ]
            assert "its answers cannot be understood" in seen.failures[0][1].message
            await until(lambda: pool.idle() == 1, "another worker is ready")
            pool.submit(make(3, [{"id": 3}]))
            await until(lambda: seen.answered() == 3, "the next batch is answered")
            assert len(seen.replies) == 1
            assert not seen.fatal

    run(test)


def test_a_killed_worker_costs_its_running_batch_one_execution_and_its_queued_batch_none(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_pool() as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            pool.submit(make(1, [{"id": 1, "do": "compute", "until": str(tmp_path / "never")}]))
            pool.submit(make(2, [{"id": 2}]))
            assert pool.room() == 0
            (worker,) = pool.workers()
            os.kill(worker.pid, signal.SIGKILL)
            await until(lambda: seen.answered() == 2, "both are answered")
            assert [(it.id, failure.kind, executed) for it, failure, executed in seen.failures] == [
                (1, "WorkerDied", True),
                (2, "WorkerDied", False),
            ]
            assert "SIGKILL" in seen.failures[0][1].message
            assert seen.restarts == ["killed"]
            await until(lambda: pool.idle() == 1, "another worker is ready")
            assert pool.restarts(0) == 1

    run(test)


def test_a_batch_past_its_deadline_fails_and_only_its_worker_is_replaced(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_pool(workers=2, batch_timeout_s=0.3) as (pool, seen):
            await until(lambda: pool.idle() == 2, "the workers are ready")
            pids = {it.pid for it in pool.workers()}
            pool.submit(make(1, [{"id": 1, "do": "compute", "until": str(tmp_path / "never")}]))
            await until(lambda: seen.answered() == 1, "the batch is given up")
            assert seen.failures[0][1].kind == "DeadlineExceeded"
            assert seen.restarts == ["deadline"]
            await until(lambda: pool.idle() == 2, "both workers are ready")
            assert len(pids & {it.pid for it in pool.workers()}) == 1

    run(test)


def test_a_backend_that_cannot_be_initialized_stops_the_pool_with_the_cause() -> None:
    async def test() -> None:
        async with running_pool("Broken", start_attempts=2) as (pool, seen):
            await until(lambda: seen.fatal, "the pool gives up")
            (error,) = seen.fatal
            assert isinstance(error, WorkerStartError)
            assert error.attempts == 2
            assert "the weights are not there" in str(error)
            assert seen.restarts == ["start_failed"]
            assert pool.idle() == 0

    run(test)


def test_a_worker_is_given_nothing_while_its_backend_is_not_ready(tmp_path: Path) -> None:
    async def test() -> None:
        ready = tmp_path / "ready"
        async with running_pool("ReadyWhenTold", env={"READY_FILE": str(ready)}) as (pool, _):
            await until(lambda: [it.state for it in pool.workers()] == ["ready"], "the worker is initialized")
            assert pool.room() == 0
            ready.touch()
            await until(lambda: pool.room() == 2, "the backend is ready")

    run(test)


def test_a_worker_is_recycled_after_its_batches_with_the_new_one_warm_before() -> None:
    async def test() -> None:
        async with running_pool(recycle={"max_batches": 3}) as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            first = pool.workers()[0].pid
            for number in range(1, 100_000):
                await until(lambda: pool.room() > 0, "there is room")
                pool.submit(make(number, [{"id": number}]))
                await until(lambda number=number: seen.answered() == number, "answered")  # type: ignore[misc]
                assert pool.idle() == 1, "a worker is there at any time"
                if seen.restarts:
                    break
            await until(lambda: seen.restarts == ["recycled"], "the worker was replaced")
            await until(lambda: not psutil.pid_exists(first), "the old one has ended")
            assert pool.workers()[0].pid != first
            assert not seen.failures

    run(test)


def test_workers_get_their_environment_before_anything_is_imported() -> None:
    async def test() -> None:
        async with running_pool(workers=2, env={"COLOUR": "blue"}, devices=["3", "5"], threads_per_worker=7) as (
            pool,
            seen,
        ):
            await until(lambda: pool.idle() == 2, "the workers are ready")
            for number in range(2):
                pool.submit(
                    make(
                        number,
                        [
                            {"id": 1, "do": "environment", "name": name}
                            for name in ("COLOUR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
                        ],
                    )
                )
            await until(lambda: seen.answered() == 2, "both are answered")
            answers = sorted([it["value"] for it in results(reply)] for reply in seen.replies)
            assert answers == [["blue", "3", "7"], ["blue", "5", "7"]]

    run(test)


def test_workers_end_with_the_pool_and_leave_nothing_behind(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_pool(workers=2) as (pool, _):
            await until(lambda: pool.idle() == 2, "the workers are ready")
            pool.submit(make(1, [{"id": 1, "do": "compute", "until": str(tmp_path / "never")}]))
            pids = [it.pid for it in pool.workers()]
        assert not [pid for pid in pids if psutil.pid_exists(pid)]

    run(test)


def test_a_backend_that_is_not_there_is_not_tried_again() -> None:
    async def test() -> None:
        async with running_pool("Absent", start_attempts=5) as (_, seen):
            await until(lambda: seen.fatal, "the pool gives up")
            assert seen.restarts == []
            assert "Absent" in str(seen.fatal[0])

    run(test)


def test_a_class_written_against_packflow_runs_unchanged() -> None:
    async def test() -> None:
        config = {"input_format": "numpy", "feature_names": ["x", "deep.y"], "factor": 3}
        async with running_pool("tests.support.packflow_backends:Doubled", config=config) as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            pool.submit(make(1, [{"x": 1, "deep": {"y": 2}}, {"x": 5, "deep": {"y": 0}}]))
            pool.submit(make(2, [{"x": -1, "deep": {"y": 2}}]))
            await until(lambda: seen.answered() == 2, "both are answered")
            assert results(seen.replies[0]) == [{"doubled": [3, 6]}, {"doubled": [15, 0]}]
            assert seen.replies[0].metrics["execution_times"]["transform_inputs"] is None
            ((_, failure, executed),) = seen.failures
            assert (failure.stage, failure.kind, executed) == ("execute", "ValueError", True)

    run(test)


def test_a_successor_that_does_not_start_leaves_the_old_worker_at_work(tmp_path: Path) -> None:
    async def test() -> None:
        only_once = {"ONLY_ONCE_FILE": str(tmp_path / "taken")}
        async with running_pool("OneAtATime", recycle={"max_batches": 2}, env=only_once) as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            (worker,) = pool.workers()
            for number in range(1, 9):
                await until(lambda: pool.room() > 0, "there is room")
                pool.submit(make(number, [{"id": number}]))
                await until(lambda number=number: seen.answered() == number, "answered")  # type: ignore[misc]
            await until((tmp_path / "taken.again").exists, "a successor was tried")
            await until(lambda: worker.state == "ready", "the old one is kept")
            assert pool.workers() == [worker]
            assert not seen.fatal

    run(test)


def test_a_worker_is_recycled_only_for_one_that_is_ready(tmp_path: Path) -> None:
    async def test() -> None:
        ready = tmp_path / "ready"
        ready.touch()
        environment = {"READY_FILE": str(ready)}
        async with running_pool("ReadyWhenTold", recycle={"max_batches": 1}, env=environment) as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            (old,) = pool.workers()
            ready.unlink()
            pool.submit(make(1, [{"id": 1}]))
            await until(lambda: old.successor is not None and old.successor.initialize_s is not None, "it is warm")
            assert pool.workers() == [old]
            assert pool.room() == 2
            ready.touch()
            await until(lambda: seen.restarts == ["recycled"], "the ready one has taken over")

    run(test)


def test_what_a_backend_started_ends_with_its_worker(tmp_path: Path) -> None:
    async def test() -> None:
        child = tmp_path / "child"
        async with running_pool(batch_timeout_s=0.5) as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            record = {"id": 1, "do": "fork", "child": str(child), "until": str(tmp_path / "never")}
            pool.submit(make(1, [record]))
            await until(lambda: seen.answered() == 1, "the deadline ends the worker")
            pid = int(child.read_text())
            await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", "gone too")

    run(test)


def test_a_worker_leaves_sigterm_to_the_parent() -> None:
    async def test() -> None:
        async with running_pool() as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            (worker,) = pool.workers()
            os.kill(worker.pid, signal.SIGTERM)
            pool.submit(make(1, [{"id": 1}]))
            await until(lambda: seen.answered() == 1, "the batch is answered")
            assert len(seen.replies) == 1
            assert not seen.restarts

    run(test)


def test_a_message_with_half_a_surrogate_pair_costs_its_batch_only() -> None:
    async def test() -> None:
        async with running_pool() as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            pool.submit(make(1, [{"id": 1, "do": "surrogate"}]))
            pool.submit(make(2, [{"id": 2, "do": "refuse"}]))
            await until(lambda: seen.answered() == 2, "both are answered")
            assert seen.failures[0][1].kind == "ValueError"
            assert results(seen.replies[0]) == ["RecordError"]
            assert not seen.restarts

    run(test)


def test_the_pool_stops_at_once_while_a_worker_waits_for_its_restart() -> None:
    async def test() -> None:
        async with running_pool("Broken", start_attempts=50, restart_backoff_ms=30_000) as (_, seen):
            await until(lambda: seen.restarts, "a start has failed")
            begun = time.monotonic()
        assert time.monotonic() - begun < 4

    run(test)


def test_a_configuration_may_have_keys_that_are_numbers() -> None:
    async def test() -> None:
        config = {"rename_fields": {}, "names": {0: "no", 1: "yes"}}
        async with running_pool("Named", config=config) as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            pool.submit(make(1, [{"id": 1}]))
            await until(lambda: seen.answered() == 1, "the batch is answered")
            assert results(seen.replies[0]) == [{"name": "yes"}]

    run(test)


def test_a_fault_while_a_worker_ends_is_not_swallowed() -> None:
    async def test() -> None:
        async with running_pool() as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")

            def fail(*_: object) -> None:
                raise RuntimeError("a fault of ours")

            pool._events.on_failed = fail
            pool.submit(make(1, [{"id": 1, "do": "die"}]))
            await until(lambda: seen.fatal, "it is told")
            assert "a fault of ours" in str(seen.fatal[0])

    run(test)


def test_a_worker_that_died_gets_nothing_more() -> None:
    async def test() -> None:
        async with running_pool() as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            (worker,) = pool.workers()
            os.kill(worker.pid, signal.SIGKILL)
            await until(lambda: worker.process is not None and worker.process.returncode is not None, "it is dead")
            assert not worker.open
            await until(lambda: pool.idle() == 1, "another is ready")
            assert not seen.failures

    run(test)


def test_a_backend_can_terminate_what_it_forked() -> None:
    async def test() -> None:
        async with running_pool("Forking") as (pool, seen):
            await until(lambda: pool.idle() == 1, "a worker is ready")
            pool.submit(make(1, [{"id": 1}]))
            await until(lambda: seen.answered() == 1, "the batch is answered")
            assert results(seen.replies[0]) == [{"code": -signal.SIGTERM}]

    run(test)
