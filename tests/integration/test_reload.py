"""Reloads of a processor with real workers, over the in-memory broker: what fails, and what comes at a bad time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from streamproc.errors import ReloadBusyError, ReloadRefusedError
from streamproc.observe.prediction import Prediction
from streamproc.runtime.app import Application
from streamproc.runtime.processor import Processor
from streamproc.runtime.reload import Reloader
from streamproc.runtime.startup import declared_topics, worker_setup
from streamproc.settings import Settings
from streamproc.settings_loading import load_settings
from streamproc.testing import MemoryBroker
from tests.support.asyncs import until

PARTITIONS = 2
BACKEND = """
import os, time
from pathlib import Path
from pydantic import BaseModel
from streamproc import InferenceBackend

class Result(BaseModel):
    id: int
    version: int = %(version)d

class Backend(InferenceBackend):
    output_model = Result

    def initialize(self):
        while %(wait)r and not Path(%(wait)r).exists():
            time.sleep(0.01)

    def length(self, record):
        return %(version)d

    def execute(self, inputs):
        for it in inputs:
            while "until" in it and not Path(it["until"]).exists():
                time.sleep(0.01)
            if it.get("do") == "fail" and %(version)d == 1:
                raise ValueError("the model is broken")
            if it.get("do") == "die" and %(version)d == 1:
                os.kill(os.getpid(), 9)
        return [{"id": it["id"], "version": %(version)d} for it in inputs]
"""


class Project:
    """A folder with settings and a backend, and a processor that runs it."""

    def __init__(self, folder: Path, **task: Any) -> None:
        self.folder = folder
        self.task = task
        self.broker = MemoryBroker()
        for name in ("in", "in.results", "in.dead"):
            self.broker.create_topic(name, PARTITIONS)
        self.broker.create_topic("app.metrics")
        self.sent = 0
        self.settings: list[Settings] = []
        self.write(1)

    def write(self, version: int, *, wait: Path | str = "", **sections: Any) -> None:
        """The next version; ``wait`` is a file that its ``initialize`` waits for."""
        (self.folder / "inference.py").write_text(BACKEND % {"version": version, "wait": str(wait)})
        task = {"input": {"topics": ["in"]}, "commit_interval_ms": 20, **self.task}
        told = {
            "name": "app",
            "backend": {"path": "inference:Backend", "version": str(version)},
            "tasks": {"main": task},
        }
        (self.folder / "streamproc.yaml").write_text(yaml.safe_dump({**told, **sections}))

    def load(self) -> Settings:
        return load_settings(self.folder / "streamproc.yaml", {})

    def put(self, count: int, **fields: Any) -> None:
        for index in range(self.sent, self.sent + count):
            self.broker.append("in", json.dumps({"id": index, **fields}).encode(), partition=index % PARTITIONS)
        self.sent += count

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[tuple[Processor, Reloader]]:
        settings = self.load()
        setup = worker_setup(settings, declared_topics(settings))
        processor = Processor(settings, setup, self.broker, rng=random.Random(1))
        reloader = Reloader(processor, self.load, time.time, lambda settings, _: self.settings.append(settings))
        try:
            await processor.start()
            await processor.until_ready()
            yield processor, reloader
        finally:
            await processor.stop()

    async def all_committed(self) -> None:
        await until(lambda: sum(self.broker.committed("app.main").values()) == self.sent, "everything is committed")

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(it.value or b"") for it in self.broker.records("in.results")]

    def versions(self) -> Counter[int]:
        return Counter(it["result"]["version"] for it in self.results())

    def each_once(self) -> bool:
        return sorted(it["result"]["id"] for it in self.results()) == list(range(self.sent))


@pytest.fixture
def project(tmp_path: Path) -> Callable[..., Project]:
    return lambda **task: Project(tmp_path, **task)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_what_runs_is_finished_by_the_version_that_has_it_and_the_rest_goes_to_the_next(
    delivery: str, project: Callable[..., Project], tmp_path: Path
) -> None:
    async def test() -> None:
        it, done = project(batch={"max_size": 1}, delivery=delivery), tmp_path / "done"
        async with it.running() as (processor, reloader):
            it.put(6, until=str(done))
            (worker,) = processor.pool.workers()
            await until(lambda: len(worker.batches) == 2, "one runs, one is queued")
            it.write(2)
            status = await reloader.reload()
            assert (status.outcome, status.generation, status.backend_version) == ("taken", 2, "2")
            done.touch()
            await it.all_committed()
            assert [settings.backend.version for settings in it.settings] == ["2"]
            assert processor.status().last_reload == status
        assert (it.each_once(), it.versions()) == (True, {1: 2, 2: 4})
        versions = [json.loads(record.value or b"")["backend_version"] for record in it.broker.records("app.metrics")]
        assert Counter(versions) == {"1": 2, "2": 4}

    run(test)


def test_predictions_that_wait_over_a_reload_are_answered_by_the_new_version(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    async def test() -> None:
        it, done = project(batch={"max_size": 1}), tmp_path / "done"
        async with it.running() as (processor, reloader):
            (old,) = processor.pool.workers()
            ask = [processor.request("main") for _ in range(5)]
            answers = [
                request.submit([json.dumps({"id": number, "until": str(done)}).encode()])
                for number, request in enumerate(ask)
            ]
            await until(lambda: len(old.batches) == 2, "one runs, one is queued")
            it.write(2)
            await reloader.reload()
            done.touch()
            told = [await answer for answer in answers]
            for request in ask:
                request.leave()
        values = [one.values[0] for one in told if isinstance(one, Prediction)]
        results = [json.loads(value) for value in values if isinstance(value, bytes)]
        assert [(result["id"], result["version"]) for result in results] == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 2)]

    run(test)


def test_a_batch_of_a_worker_that_dies_after_the_switch_goes_to_the_new_version(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    async def test() -> None:
        it, done = project(batch={"max_size": 1}), tmp_path / "done"
        async with it.running() as (processor, reloader):
            it.put(1, until=str(done), do="die")
            it.put(1)
            (old,) = processor.pool.workers()
            await until(lambda: len(old.batches) == 2, "one runs, one is queued")
            it.write(2)
            await reloader.reload()
            done.touch()
            await it.all_committed()
        assert (it.each_once(), it.versions()) == (True, {2: 2})

    run(test)


def test_a_new_worker_that_is_killed_while_it_loads_is_a_refusal_and_the_next_reload_is_not(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    async def test() -> None:
        it, loads = project(), tmp_path / "loads"
        async with it.running() as (processor, reloader):
            it.write(2, wait=loads)
            reloading = asyncio.ensure_future(reloader.reload())
            await until(lambda: _candidate_pid(processor), "a new worker is starting")
            assert processor.status().reloading
            with pytest.raises(ReloadBusyError, match="another reload is under way"):
                await reloader.reload()
            second = asyncio.ensure_future(reloader.reload(wait=True))
            os.kill(_candidate_pid(processor), signal.SIGKILL)
            with pytest.raises(ReloadRefusedError, match="its worker 0 did not become ready: killed by SIGKILL"):
                await reloading
            it.put(10)
            await it.all_committed()
            assert it.versions() == {1: 10}
            loads.touch()
            assert (await second).outcome == "taken"
            it.put(10)
            await it.all_committed()
        assert (it.each_once(), it.versions()) == (True, {1: 10, 2: 10})

    run(test)


def _candidate_pid(processor: Processor) -> int:
    candidates = processor.pool._candidates
    return 0 if candidates is None or not candidates.workers else candidates.workers[0].pid


def test_a_stop_in_the_middle_of_a_reload_is_not_kept_waiting(project: Callable[..., Project], tmp_path: Path) -> None:
    async def test() -> None:
        it = project()
        async with it.running() as (processor, reloader):
            it.write(2, wait=tmp_path / "never")
            reloading = asyncio.ensure_future(reloader.reload())
            await until(lambda: _candidate_pid(processor), "a new worker is starting")
            await processor.stop()
            with pytest.raises(ReloadRefusedError, match="the processor is stopping"):
                await reloading
            with pytest.raises(ReloadBusyError, match="the processor is stopping"):
                await reloader.reload()

    run(test)


def test_whoever_asked_for_a_reload_may_go_and_it_goes_on(project: Callable[..., Project], tmp_path: Path) -> None:
    async def test() -> None:
        it, loads = project(), tmp_path / "loads"
        async with it.running() as (processor, reloader):
            it.write(2, wait=loads)
            reloading = asyncio.ensure_future(reloader.reload())
            await until(lambda: _candidate_pid(processor), "a new worker is starting")
            reloading.cancel()
            loads.touch()
            await until(lambda: processor.last_reload, "it ends")
            assert processor.pool.generation == 2

    run(test)


BROKEN: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "no module": ("import torhc", {}, "torhc"),
    "no backend": ("Backend = 3", {}, "Backend"),
    "a setting that is none": (None, {"pool": {"wrokers": 2}}, "workers"),
    "no such topics": (None, {"topics_dir": "nowhere"}, "there is no folder"),
    "another group": (None, {"name": "other"}, "name has changed, which needs a restart"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_version_is_refused_with_its_reason_and_the_old_one_goes_on(
    kind: str, project: Callable[..., Project]
) -> None:
    code, sections, reason = BROKEN[kind]

    async def test() -> None:
        it = project()
        async with it.running() as (processor, reloader):
            it.write(2, **sections)
            if code is not None:
                (it.folder / "inference.py").write_text(code)
            with pytest.raises(ReloadRefusedError, match=reason):
                await reloader.reload()
            status = processor.status()
            assert status.last_reload is not None
            assert (status.generation, status.backend_version, status.reloading) == (1, "1", False)
            assert (status.last_reload.outcome, reason in (status.last_reload.reason or "")) == ("refused", True)
            assert processor.ready().ok
            it.put(5)
            await it.all_committed()
            assert it.settings == []
        assert it.versions() == {1: 5}

    run(test)


@pytest.mark.parametrize(
    ("line", "broken", "reason"),
    [
        ("for it in inputs:", "for it in inputs[0]['text']:", "execute.* KeyError: 'text'"),
        ("for it in inputs]", "for it in inputs[1:]]", "the backend answered 0 outputs; return one per record"),
    ],
)
def test_a_version_that_fails_on_the_sample_records_is_refused(
    project: Callable[..., Project], line: str, broken: str, reason: str
) -> None:
    async def test() -> None:
        it = project()
        topics = it.folder / "topics"
        (topics / "samples").mkdir(parents=True)
        (topics / "samples" / "in.jsonl").write_text(json.dumps({"id": 1}) + "\n")
        (topics / "in.yaml").write_text("topic: in\npartitions: 2\nsamples: samples/in.jsonl\n")
        async with it.running() as (processor, reloader):
            it.write(2)
            file = it.folder / "inference.py"
            file.write_text(file.read_text().replace(line, broken))
            with pytest.raises(ReloadRefusedError, match=f"of task main on 1 sample records failed: {reason}"):
                await reloader.reload()
            assert processor.pool.generation == 1

    run(test)


def test_a_circuit_that_the_old_version_opened_closes_and_one_opened_by_hand_does_not(
    project: Callable[..., Project],
) -> None:
    async def test() -> None:
        circuit = {"min_records": 5, "close_after_s": None}
        it = project(on_error={"retries": 0, "circuit": circuit}, batch={"max_size": 4})
        async with it.running() as (processor, reloader):
            task = processor.tasks["main"]
            it.put(60, do="fail")
            await until(lambda: task.circuit.is_open, "the circuit opens")
            it.write(2)
            await reloader.reload()
            assert not task.circuit.is_open
            await it.all_committed()
            processor.open_circuit("main")
            it.put(10)
            it.write(3)
            await reloader.reload()
            assert task.circuit.is_open
            processor.close_circuit("main")
            await it.all_committed()
        dead = len(it.broker.records("in.dead"))
        assert dead < 60
        assert it.versions() == {2: 60 - dead, 3: 10}

    run(test)


def test_limits_workers_and_lengths_are_those_of_the_new_version(project: Callable[..., Project]) -> None:
    async def test() -> None:
        it = project(batch={"max_size": 1, "length": "backend", "strategy": "bucketed"})
        async with it.running() as (processor, reloader):
            it.put(4)
            await it.all_committed()
            measurer = processor.measuring.pid if processor.measuring is not None else None
            it.task["batch"]["max_size"] = 8
            it.write(7, pool={"workers": 2})
            await reloader.reload()
            assert processor.ready().ok
            assert len(processor.pool.workers()) == 2
            assert processor.measuring is not None
            assert processor.measuring.pid != measurer
            it.put(400)
            await it.all_committed()
            assert processor.status().tasks["main"].counts.results == 404
        records = [json.loads(record.value or b"") for record in it.broker.records("app.metrics")]
        sizes = {version: {r["records"] for r in records if r["backend_version"] == version} for version in ("1", "7")}
        assert sizes["1"] == {1}
        assert max(sizes["7"]) == 8
        assert it.each_once()

    run(test)


def test_the_documentation_has_the_schemas_of_the_version_in_force(tmp_path: Path) -> None:
    async def test() -> None:
        project = Project(tmp_path)

        def declare(version: int) -> None:
            folder = tmp_path / "topics"
            folder.mkdir(exist_ok=True)
            (folder / "in.yaml").write_text(yaml.safe_dump({"topic": "in", "schema": "in.json", "partitions": 2}))
            (folder / "in.json").write_text(json.dumps({"type": "object", "title": f"records of {version}"}))

        def write(version: int) -> None:
            declare(version)
            project.write(version, http={"port": 0}, topics_dir=str(tmp_path / "topics"))

        def load() -> Settings:
            return project.load()

        write(1)
        application = Application(load(), project.broker, load=load)
        async with application:
            await application.processor.until_ready()
            assert application.sidecar is not None
            assert application.reloader is not None
            async with httpx.AsyncClient(base_url=application.sidecar.url) as client:

                async def documented() -> tuple[str, int]:
                    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
                    return schemas["main.record"]["title"], schemas["main.result"]["properties"]["version"]["default"]

                assert await documented() == ("records of 1", 1)
                write(2)
                assert await documented() == ("records of 1", 1)
                await application.reloader.reload()
                assert await documented() == ("records of 2", 2)

    asyncio.run(test())
