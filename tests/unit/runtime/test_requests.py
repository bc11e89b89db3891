"""Requests over HTTP beside Kafka's records, in the task's real stages: a machine plays clients, workers and time.

In whatever order things happen: each request is answered exactly once and with its own results, no record runs whose
client left before it went to a worker, nothing is left behind, and Kafka's records fare as they do without requests.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamproc.errors import RequestError, RequestsFullError, TaskUnavailableError
from streamproc.observe.metrics import Metrics
from streamproc.observe.prediction import Prediction
from streamproc.records import Batch, Cause, Failure, Status, TopicPartition
from streamproc.runtime.batch_plan import BatchPlan
from streamproc.runtime.failures import encode_failure
from streamproc.runtime.pool import Reply
from streamproc.runtime.requests import Request
from streamproc.runtime.task_stream import TaskStream
from streamproc.settings import Settings
from streamproc.testing import MemoryBroker
from tests.support.fake_workers import ManualLoop
from tests.support.spans import FakeRecord

MAX_REQUESTS = 4
MAX_WAITING_BYTES = 120
REJECTED = Failure(Cause.REJECTED, "execute", "RecordError", "no")
WORKERS = 2
PARTITION = TopicPartition("in", 0)


class Client:
    """One who asked: what for, and what came of it."""

    def __init__(self, number: int, request: Request) -> None:
        self.number = number
        self.request = request
        self.values: list[bytes] = []
        self.answer: asyncio.Future[Prediction | RequestError] | None = None
        self.left = False

    @property
    def waits(self) -> bool:
        return not self.left and (self.answer is None or not self.answer.done())


class Clients(RuleBasedStateMachine):
    @initialize(
        batch_with=st.sampled_from(["apart", "kafka"]),
        strategy=st.sampled_from(["fifo", "bucketed", "exact"]),
        max_size=st.sampled_from([1, 3, 16]),
        ordering=st.sampled_from(["partition", "unordered"]),
    )
    def begin(self, *, batch_with: str, strategy: str, max_size: int, ordering: str) -> None:
        self.loop = ManualLoop()
        asyncio.set_event_loop(self.loop)
        predict = {"batch_with": batch_with, "max_requests": MAX_REQUESTS, "max_waiting_bytes": MAX_WAITING_BYTES}
        batch = {"max_size": max_size, "strategy": strategy, "length": "bytes"}
        settings = Settings.model_validate(
            {
                "name": "app",
                "backend": {"path": "a:B"},
                "http": {"predict": {**predict, "max_body_bytes": MAX_WAITING_BYTES}},
                "tasks": {"main": {"input": {"topics": ["in"]}, "batch": batch, "ordering": ordering}},
            }
        )
        self.broker = MemoryBroker()
        for topic in ("in", "in.results", "in.dead", "app.metrics"):
            self.broker.create_topic(topic)
        ids = itertools.count(1)
        self.fatal: list[Exception] = []
        self.task = TaskStream(
            "main",
            settings,
            self.broker,
            Metrics().task("main"),
            plan=BatchPlan(settings.tasks["main"].batch),
            measuring=None,
            tracing=None,
            next_id=lambda: next(ids),
            rng=random.Random(1),
            clock=self.loop.time,
            wall_clock=self.loop.time,
            on_work=lambda: None,
            on_fatal=self.fatal.append,
        )
        self.do(self.task.connect())
        self.task.ledger.open([PARTITION])
        self.task.state = "running"
        self.clients: list[Client] = []
        self.running: list[Batch] = []
        self.offset = 0
        self.draining: asyncio.Task[None] | None = None

    def do(self, work: Any) -> Any:
        """Run what a coroutine does at once, and all that follows."""
        task = self.loop.create_task(work)
        self.loop.settle()
        return task.result()

    async def call(self, act: Any) -> Any:
        return act()

    def act(self, act: Any) -> Any:
        return self.do(self.call(act))

    # -- clients

    @rule(count=st.integers(1, 5))
    def ask(self, count: int) -> None:
        client = self.come()
        if client is not None:
            self.hand_in(client, count)

    @rule()
    def ask_without_a_body_yet(self) -> None:
        self.come()

    def come(self) -> Client | None:
        waiting = len(self.task.requests)
        try:
            client = Client(len(self.clients), self.act(self.task.request))
        except RequestsFullError:
            assert waiting == MAX_REQUESTS
            return None
        except TaskUnavailableError:
            assert self.task.circuit.is_open or self.draining is not None
            return None
        assert waiting < MAX_REQUESTS
        self.clients.append(client)
        return client

    @precondition(lambda self: any(it.answer is None and it.waits for it in self.clients))
    @rule(data=st.data(), count=st.integers(1, 3))
    def finish_the_body(self, data: st.DataObject, count: int) -> None:
        self.hand_in(data.draw(st.sampled_from([it for it in self.clients if it.answer is None and it.waits])), count)

    def hand_in(self, client: Client, count: int) -> None:
        values = [json.dumps({"r": client.number, "i": index}).encode() for index in range(count)]
        size = sum(map(len, values))
        try:
            client.request.hold(size)
        except RequestsFullError:
            assert self.task.requests.size_bytes + size > MAX_WAITING_BYTES
            client.left = True
            self.act(lambda: client.request.leave("full"))
            return
        client.values = values
        client.answer = self.act(lambda: client.request.submit(values))

    @precondition(lambda self: any(it.waits for it in self.clients))
    @rule(data=st.data(), how=st.sampled_from(["left", "timeout"]))
    def leave(self, data: st.DataObject, how: Any) -> None:
        client = data.draw(st.sampled_from([it for it in self.clients if it.waits]))
        client.left = True
        self.act(lambda: client.request.leave(how))

    # -- Kafka, circuit, time

    @precondition(lambda self: self.draining is None and not self.task.circuit.is_open)
    @rule(count=st.integers(1, 5))
    def read(self, count: int) -> None:
        records = [FakeRecord(self.offset + index, value=b'{"kafka": %d}' % index) for index in range(count)]
        self.offset += count
        self.act(lambda: self.task._on_records(PARTITION, records))

    @rule()
    def open_the_circuit(self) -> None:
        self.act(self.task.open_circuit)
        assert not self.waiting_for_a_worker()

    @rule()
    def close_the_circuit(self) -> None:
        self.act(self.task.close_circuit)

    @rule(seconds=st.sampled_from([0.001, 0.1, 40.0]))
    def wait(self, seconds: float) -> None:
        self.loop.advance(seconds)

    @precondition(lambda self: self.draining is None)
    @rule()
    def drain(self) -> None:
        self.draining = self.loop.create_task(self.task.drain())
        self.loop.settle()
        assert not self.waiting_for_a_worker()

    # -- workers

    @precondition(lambda self: not self.task.circuit.is_open and len(self.running) < WORKERS)
    @rule(last=st.booleans())
    def dispatch(self, last: bool) -> None:
        batch = self.act(self.task.take_again)
        if batch is None:
            lanes = [lane for lane in self.task.lanes if lane.batcher.opened_at is not None]
            if not lanes:
                return
            batch = lanes[-1 if last else 0].batcher.take(self.loop.now, "backlog")
        waiting = {client.request.lease for client in self.clients if client.waits}
        for span in batch.spans:
            assert not span.lease.is_request or span.lease in waiting, "somebody waits for each record that runs"
        self.task.dispatched(batch, self.loop.now)
        self.running.append(batch)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), bad=st.sets(st.integers(0, 8)))
    def answer(self, data: st.DataObject, bad: set[int]) -> None:
        batch = self.take_running(data)
        records = [record for span in batch.spans for record in span.records]
        statuses = bytes([Status.FAILED if index in bad else Status.RESULT for index in range(len(records))])
        told = encode_failure(REJECTED)
        values = [memoryview(told if index in bad else record.value or b"") for index, record in enumerate(records)]
        sizes = [span.size_bytes for span in batch.spans]
        reply = Reply(batch, 0, statuses, values, sizes, {"batch_size": len(records)}, 0.0, 0.0, 1.0)
        self.act(lambda: self.task.replied(reply))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), cause=st.sampled_from([Cause.CRASH, Cause.EXCEPTION, Cause.TIMEOUT]), executed=st.booleans())
    def fail(self, data: st.DataObject, cause: Cause, executed: bool) -> None:
        batch = self.take_running(data)
        failure = Failure(cause, "worker", "WorkerDied", "it died")
        self.act(lambda: self.task.failed(batch, failure, executed, 0))

    def take_running(self, data: st.DataObject) -> Batch:
        return self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))

    # -- what holds

    def waiting_for_a_worker(self) -> list[Any]:
        return self.task._undispatched(set(self.task.requests.leases()))

    @invariant()
    def everybody_is_answered_once_and_with_what_is_theirs(self) -> None:
        for client in self.clients:
            if client.answer is None or not client.answer.done():
                continue
            assert not client.left, "nothing comes for those who left"
            answer = client.answer.result()
            assert not self.task.requests.waits(client.request.lease)
            if isinstance(answer, Prediction):
                assert len(answer.values) == len(client.values)
                for value, sent in zip(answer.values, client.values, strict=True):
                    assert isinstance(value, Failure) or value == sent
            else:
                assert isinstance(answer, TaskUnavailableError)

    @invariant()
    def places_are_taken_by_those_who_wait_and_by_nobody_else(self) -> None:
        waiting = [it for it in self.clients if it.waits]
        refused = [it for it in waiting if not self.task.requests.waits(it.request.lease)]
        assert all(it.answer is None for it in refused), "who is refused while the body comes learns of it at its end"
        held = [it for it in waiting if it not in refused]
        assert len(self.task.requests) == len(held)
        assert self.task.requests.size_bytes == sum(it.request.size_bytes for it in held)
        assert sum(self.task.counts.requests.values()) >= len(self.clients) - len(held)
        assert not self.fatal

    def teardown(self) -> None:
        """Whatever is under way comes to its end, and then nothing is left."""
        if not hasattr(self, "task"):
            return
        try:
            self.come_to_an_end()
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.settle()
            self.loop.close()
            asyncio.set_event_loop(None)

    def come_to_an_end(self) -> None:
        self.act(self.task.close_circuit)
        for client in self.clients:
            if client.waits and client.answer is None:
                client.left = True
                self.act(client.request.leave)
        for _ in range(1_000):
            while self.running:
                batch = self.running.pop()
                values = [memoryview(record.value or b"") for span in batch.spans for record in span.records]
                sizes = [span.size_bytes for span in batch.spans]
                reply = Reply(batch, 0, bytes(len(values)), values, sizes, {}, 0.0, 0.0, 1.0)
                self.act(lambda reply=reply: self.task.replied(reply))
            self.dispatch(last=True)
            self.dispatch(last=False)
            if not self.running:
                self.loop.advance(40.0)
                if not self.task._retries and not self.task.again:
                    break
        assert len(self.task.requests) == self.task.requests.size_bytes == 0
        assert not any(it.waits for it in self.clients)
        assert self.draining is None or self.draining.done()
        if self.draining is None:
            assert self.task.in_flight() == 0, "each of Kafka's records is settled"
            assert self.task.ledger.committable().get(PARTITION, 0) == self.offset


Clients.TestCase.settings = hypothesis_settings(max_examples=100, stateful_step_count=40, deadline=None)
test_requests_are_answered_once_whatever_happens = Clients.TestCase


@pytest.mark.parametrize("executed", [True, False])
def test_a_batch_that_comes_back_goes_again_without_the_records_of_those_who_left(executed: bool) -> None:
    it = Clients()
    it.begin(batch_with="kafka", strategy="fifo", max_size=16, ordering="partition")
    it.read(2)
    it.ask(2)
    it.ask(1)
    it.dispatch(last=False)
    (batch,) = it.running
    assert (batch.size, batch.requested) == (5, 3)
    it.running.clear()
    it.clients[0].left = True
    it.act(it.clients[0].request.leave)
    it.act(lambda: it.task.failed(batch, Failure(Cause.EXCEPTION, "execute", "ValueError", "no"), executed, 0))
    it.loop.advance(40.0)
    it.dispatch(last=False)
    (again,) = it.running
    assert (again.size, again.requested) == (3, 1)
    it.teardown()
