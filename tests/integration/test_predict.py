"""Predictions over HTTP, with real workers and real sockets, beside records from the in-memory broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from streamproc.observe.http import create_app
from streamproc.observe.prediction import TaskInput
from streamproc.observe.server import Sidecar
from streamproc.runtime.processor import Processor
from streamproc.runtime.startup import worker_setup
from streamproc.settings import Settings
from streamproc.testing import MemoryBroker
from tests.support.asyncs import until

ROOT = Path(__file__).parents[2]
PATH = "/tasks/main/predict"
BOTH = pytest.mark.parametrize("batch_with", ["apart", "kafka"])


class Served:
    """A processor, its sidecar, and a client."""

    def __init__(self, processor: Processor, sidecar: Sidecar, client: httpx.AsyncClient, broker: MemoryBroker) -> None:
        self.processor = processor
        self.sidecar = sidecar
        self.client = client
        self.broker = broker
        self.task = processor.tasks["main"]

    async def predict(self, body: Any, **options: Any) -> httpx.Response:
        return await self.client.post(PATH, json=body, **options)

    def put(self, count: int, **fields: Any) -> None:
        for index in range(count):
            self.broker.append("in", json.dumps({"id": index, **fields}).encode())

    async def committed(self, count: int) -> None:
        await until(lambda: sum(self.broker.committed("app.main").values()) == count, f"{count} are committed")

    async def busy(self, until_there: Path) -> asyncio.Task[httpx.Response]:
        """Keep the only worker busy, and its queue full, until a file is there."""
        held = asyncio.create_task(self.predict({"id": -1, "do": "compute", "until": str(until_there)}))
        await until(lambda: self.processor.pool.room() == 1, "the worker computes")
        return held


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Served]:
    task = {"batch": {"max_size": 8, "max_wait_ms": 2}, "commit_interval_ms": 20, **options.pop("task", {})}
    settings = Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": "tests.support.backends:Scripted", "base_dir": str(ROOT)},
            "pool": {"restart_backoff_ms": 5, **options.pop("pool", {})},
            "tasks": {"main": {"input": {"topics": ["in"]}, **task}},
            "http": {"predict": options.pop("predict", {})},
            **options,
        }
    )
    broker = MemoryBroker()
    for name in ("in", "in.results", "in.dead", "app.metrics"):
        broker.create_topic(name)
    processor = Processor(settings, worker_setup(settings, {}), broker, rng=random.Random(1))
    app = create_app(processor, processor.metrics, settings.http, inputs=lambda: {"main": TaskInput()})
    sidecar = Sidecar(app, "127.0.0.1", 0)
    try:
        await sidecar.start()
        await processor.start()
        async with httpx.AsyncClient(base_url=sidecar.url, timeout=30.0) as client:
            yield Served(processor, sidecar, client, broker)
    finally:
        await processor.stop()
        await sidecar.stop()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


@BOTH
def test_records_and_requests_get_their_results_side_by_side(batch_with: str) -> None:
    async def test() -> None:
        async with serving(predict={"batch_with": batch_with}) as it:
            it.put(200)
            answers = await asyncio.gather(*(it.predict({"id": number}) for number in range(50)))
            assert [answer.json()["result"]["id"] for answer in answers] == list(range(50))
            several = (await it.predict([{"id": number} for number in range(20)])).json()
            assert [result["id"] for result in several["result"]] == list(range(20))
            assert several["errors"] == []
            assert sum(metrics["batch_size"] for metrics in several["metrics"]) >= 20, "of every batch they were in"
            one = answers[0].json()
            assert set(one) == {"result", "inference_time", "metrics"}
            assert one["inference_time"] >= one["metrics"]["total_execution_time"]
            await it.committed(200)
            results = [json.loads(record.value or b"") for record in it.broker.records("in.results")]
            assert [result["result"]["id"] for result in results] == list(range(200)), "and of Kafka's records alone"
            await until(lambda: sum(row["requested"] for row in metrics_rows(it)) == 70, "70 came over HTTP")
            await until(lambda: sum(row["records"] for row in metrics_rows(it)) == 270, "of 270 in all")
            status = it.processor.status().tasks["main"].requests
            assert (status.waiting, status.waiting_bytes, status.counts) == (0, 0, {"ok": 51})

    run(test)


def metrics_rows(it: Served) -> list[dict[str, Any]]:
    return [json.loads(record.value or b"") for record in it.broker.records("app.metrics")]


@BOTH
def test_a_record_that_fails_costs_its_request_and_no_other_and_the_answer_says_why(batch_with: str) -> None:
    async def test() -> None:
        async with serving(predict={"batch_with": batch_with}, task={"on_error": {"retries": 0}}) as it:
            it.put(30)
            bad = {
                422: {"id": 1, "do": "refuse", "why": "no"},
                500: {"id": 2, "do": "raise"},
            }
            good = [it.predict({"id": number}) for number in range(10)]
            answers = await asyncio.gather(*(it.predict(body) for body in bad.values()), *good)
            assert [answer.status_code for answer in answers] == [*bad, *[200] * 10]
            assert answers[0].json()["error"]["cause"] == "rejected"
            assert "record 2 is at fault" in answers[1].json()["detail"]
            mixed = await it.predict([{"id": 1}, bad[422], {"id": 3}])
            assert mixed.status_code == 207
            assert [result and result["id"] for result in mixed.json()["result"]] == [1, None, 3]
            assert [(error["index"], error["cause"]) for error in mixed.json()["errors"]] == [(1, "rejected")]
            assert (await it.predict({"id": 4, "do": "die"})).json()["error"]["cause"] == "crash"
            assert (await it.predict({"id": 5})).status_code == 200
            await it.committed(30)
            assert len(it.broker.records("in.results")) == 30
            assert not it.broker.records("in.dead"), "what came over HTTP is no dead letter"
            assert it.task.circuit.counts(it.processor.clock())[0] == 0, "nor does it count for the circuit"

    run(test)


def test_a_request_that_waits_when_the_circuit_opens_is_refused_with_the_reason_and_one_that_runs_is_not(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        async with serving() as it:
            running = await it.busy(tmp_path / "go")
            waiting = asyncio.create_task(it.predict({"id": 1}))
            await until(lambda: len(it.task.requests) == 2, "it waits")
            await asyncio.sleep(0)
            it.processor.open_circuit("main")
            for answer in (await waiting, await it.predict({"id": 2})):
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) > 0
                assert answer.json()["detail"] == "the circuit of task main is open: opened by hand"
            (tmp_path / "go").touch()
            assert (await running).status_code == 200
            it.processor.close_circuit("main")
            assert (await it.predict({"id": 3})).status_code == 200

    run(test)


def test_too_many_and_too_large_requests_are_turned_away_and_say_when_to_come_again(tmp_path: Path) -> None:
    async def test() -> None:
        limits = {"max_requests": 3, "max_waiting_bytes": 4_000, "max_body_bytes": 3_000, "max_records": 5}
        async with serving(predict=limits) as it:
            assert (await it.predict([{"id": 1}] * 6)).status_code == 413
            assert (await it.predict({"id": 1, "x": "y" * 3_000})).status_code == 413

            async def chunks() -> AsyncIterator[bytes]:
                for _ in range(5):
                    yield b" " * 1_000

            streamed = await it.client.post(PATH, content=chunks(), headers={"content-type": "application/json"})
            assert streamed.status_code == 413, "where nobody says how long it will be"
            running = await it.busy(tmp_path / "go")
            large = asyncio.create_task(it.predict({"id": 1, "x": "y" * 2_500}))
            await until(lambda: it.task.requests.size_bytes > 2_500, "it waits")
            refused = await it.predict({"id": 2, "x": "y" * 2_500})
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert "max_waiting_bytes" in refused.json()["detail"]
            small = asyncio.create_task(it.predict({"id": 3}))
            await until(lambda: len(it.task.requests) == 3, "all places are taken")
            refused = await it.predict({"id": 4})
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert "max_requests" in refused.json()["detail"]
            (tmp_path / "go").touch()
            assert [(await one).status_code for one in (running, large, small)] == [200] * 3
            assert it.task.requests.size_bytes == len(it.task.requests) == 0
            assert it.task.counts.requests == {"ok": 3, "full": 2, "invalid": 3}

    run(test)


def test_a_request_whose_time_is_over_is_answered_and_not_run(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(predict={"timeout_s": 0.3}) as it:
            running = asyncio.create_task(it.predict({"id": 0, "do": "compute", "until": str(tmp_path / "go")}))
            await until(lambda: it.processor.pool.room() == 1, "the worker computes")
            late = await it.predict({"id": 1, "do": "print", "once": str(tmp_path / "ran")})
            assert late.status_code == 504
            assert "0.3 s" in late.json()["detail"]
            assert (await running).status_code == 504
            assert len(it.task.requests) == 0
            (tmp_path / "go").touch()
            assert (await it.predict({"id": 2})).status_code == 200
            assert not (tmp_path / "ran").exists()

    run(test)


def test_a_thousand_clients_that_hang_up_leave_nothing_behind(tmp_path: Path) -> None:
    async def test() -> None:
        # Never full, so that none goes behind the batch that runs.
        async with serving(task={"batch": {"max_size": 1_000, "max_wait_ms": 2}}) as it:
            running = await it.busy(tmp_path / "go")
            process = psutil.Process()
            await it.predict([])
            fds, tasks = process.num_fds(), len(asyncio.all_tasks())
            body = json.dumps({"id": 1, "do": "compute", "once": str(tmp_path / "ran"), "until": str(tmp_path / "go")})
            request = (
                f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}"
            ).encode()

            async def hang_up(cut_at: int | None) -> None:
                _, writer = await asyncio.open_connection("127.0.0.1", it.sidecar.port)
                writer.write(request[:cut_at])
                await writer.drain()
                waiting.append(writer)

            for round_ in range(1, 11):
                waiting: list[asyncio.StreamWriter] = []
                # Every fourth leaves in the middle of its body.
                await asyncio.gather(*(hang_up(-10 if index % 4 == 0 else None) for index in range(100)))
                await until(lambda: len(it.task.requests) == 101, f"they wait, round {round_}")
                assert it.task.requests.size_bytes > 75 * len(body)
                for writer in waiting:
                    writer.close()
                    await writer.wait_closed()
                await until(lambda: len(it.task.requests) == 1, "only the one that runs is left")
                assert it.task.counts.requests["left"] == 100 * round_
            assert all(not lane.batcher.size for lane in it.task.lanes)
            await until(lambda: process.num_fds() <= fds, "no descriptor is left")
            await until(lambda: len(asyncio.all_tasks()) <= tasks, "nor a task")
            it.put(300)
            (tmp_path / "go").touch()
            assert (await running).status_code == 200
            answers = await asyncio.gather(*(it.predict({"id": number}) for number in range(50)))
            assert [answer.json()["result"]["id"] for answer in answers] == list(range(50))
            await it.committed(300)
            assert it.task.requests.size_bytes == len(it.task.requests) == 0
            assert (it.task.ledger.in_flight_records, it.task.ledger.in_flight_bytes) == (0, 0)
            assert not (tmp_path / "ran").exists(), "nothing of them was run"

    run(test)


def test_a_processor_that_stops_finishes_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving() as it:
            running = await it.busy(tmp_path / "go")
            waiting = asyncio.create_task(it.predict({"id": 1}))
            await until(lambda: len(it.task.requests) == 2, "it waits")
            stopping = asyncio.create_task(it.processor.stop())
            assert (await waiting).status_code == 503
            late = await it.predict({"id": 2})
            assert late.status_code == 503
            assert late.json()["detail"] == "the processor is stopping"
            assert int(late.headers["retry-after"]) > 0
            (tmp_path / "go").touch()
            assert (await running).status_code == 200
            await stopping

    run(test)


def test_a_request_in_a_batch_of_a_transaction_is_answered_whatever_becomes_of_that() -> None:
    async def test() -> None:
        async with serving(task={"delivery": "exactly_once"}, predict={"batch_with": "kafka"}) as it:
            it.put(40)
            with it.broker.acknowledgements_held():
                answers = await asyncio.gather(*(it.predict({"id": number}) for number in range(20)))
                assert [answer.json()["result"]["id"] for answer in answers] == list(range(20)), "before the commit"
            await it.committed(40)
            visible = [json.loads(record.value or b"")["result"]["id"] for record in it.broker.records("in.results")]
            assert visible == list(range(40))

    run(test)
