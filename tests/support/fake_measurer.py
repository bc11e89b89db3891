"""The measuring without a process: one that a test plays, in an event loop whose time moves when the test says so."""

from __future__ import annotations

import asyncio
import signal
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from streamproc.records import Failure, Lease, Span
from streamproc.runtime.measuring import Measuring, MeasuringEvents
from streamproc.runtime.wire import HEADER, MAX_CHUNK_RECORDS, UNMEASURED, Kind, decode_values, encode_frame
from streamproc.runtime.worker_process import MeasurerProcess
from streamproc.settings import PoolSettings
from tests.support.fake_workers import ManualLoop


@dataclass
class Asked:
    """A chunk that the process was asked about."""

    id: int
    task: str
    values: list[bytes | None]


class FakeMeasurer(MeasurerProcess):
    """A measuring process that does what the test says; ``held`` are the chunks that it has not answered."""

    def __init__(self, loop: ManualLoop, number: int, *callbacks: Any) -> None:
        super().__init__(*callbacks, max_body_bytes=8 * MAX_CHUNK_RECORDS)
        self.loop = loop
        self.number = number
        self.held: deque[Asked] = deque()
        self.asked: list[Asked] = []
        self.killed = False
        self.told_to_stop = False
        self.connected = True
        self.code: asyncio.Future[int] = loop.create_future()

    # -- what the measuring asks of it

    @property
    def pid(self) -> int:
        return self.number

    @property
    def returncode(self) -> int | None:
        return self.code.result() if self.code.done() else None

    def write(self, frame: bytes) -> None:
        kind, _, head_size, _ = HEADER.unpack(frame[: HEADER.size])
        head = orjson.loads(frame[HEADER.size : HEADER.size + head_size])
        if kind == Kind.STOP:
            self.told_to_stop = True
        elif kind == Kind.MEASURE:
            values = decode_values(frame[HEADER.size + head_size :], head["count"])
            asked = Asked(head["id"], head["task"], [None if it is None else bytes(it) for it in values])
            self.asked.append(asked)
            self.held.append(asked)

    def kill(self) -> bool:
        if self.code.done():
            return False
        self.killed = True
        return True

    async def wait(self) -> int:
        return await asyncio.shield(self.code)

    async def close(self) -> None:
        self.disconnect()

    # -- what the test has it do

    @property
    def alive(self) -> bool:
        return not self.code.done()

    def say(self, kind: Kind, body: bytes = b"", **head: Any) -> None:
        """Send a frame."""
        self.send(encode_frame(kind, head, [body], len(body)))

    def send(self, data: bytes) -> None:
        """Write to the socket."""
        self.loop.do(lambda: self._receive(data))

    def become_ready(self) -> None:
        """Be able to measure."""
        self.say(Kind.READY, initialize_s=0.1)

    def answer(self, length_of: Callable[[bytes | None], int | str] = lambda value: len(value or b"")) -> Asked:
        """Answer the chunk that is measured: a length, or why there is none."""
        asked = self.held.popleft()
        told = [length_of(value) for value in asked.values]
        lengths = array("q", [UNMEASURED if isinstance(it, str) else it for it in told])
        failures = [("Bad", it) for it in told if isinstance(it, str)]
        self.say(Kind.LENGTHS, lengths.tobytes(), id=asked.id, failures=failures)
        return asked

    def end(self, code: int = -signal.SIGKILL) -> None:
        """End, as the kernel would tell it."""
        self.code.set_result(code)
        self.loop.settle()

    def disconnect(self) -> None:
        """Close the socket."""
        if self.connected:
            self.connected = False
            self._on_closed()

    def _receive(self, data: bytes) -> None:
        position = 0
        while position < len(data):
            buffer = self._receiver.get_buffer(-1)
            count = min(len(buffer), len(data) - position)
            buffer[:count] = data[position : position + count]
            self._receiver.buffer_updated(count)
            position += count


class Bench:
    """The measuring with a played process, and everything that it told its owner."""

    def __init__(self, tasks: Sequence[str] = ("text",), **settings: Any) -> None:
        self.loop = ManualLoop()
        asyncio.set_event_loop(self.loop)
        self.processes: list[FakeMeasurer] = []
        self.measured: list[tuple[str, Span]] = []
        self.unmeasured: list[tuple[str, Span, Sequence[Failure]]] = []
        self.restarts: list[str] = []
        self.fatal: list[Exception] = []
        self.held: set[str] = set()
        self.launches_to_fail = 0
        events = MeasuringEvents(
            on_measured=lambda task, spans: self.measured.extend((task, span) for span in spans),
            on_unmeasured=lambda task, failed: self.unmeasured.extend((task, *it) for it in failed),
            on_room=lambda: self.measuring.send(self.held),
            on_restart=self.restarts.append,
            on_fatal=self.fatal.append,
        )
        self.settings = PoolSettings.model_validate({"start_attempts": 3, **settings})
        setup: dict[str, Any] = {"tasks": {task: {} for task in tasks}}
        self.measuring = Measuring(self.settings, setup, events, self.loop.time, launch=self._launch)
        self.loop.run_until_complete(self.measuring.start())
        self.loop.settle()

    @property
    def process(self) -> FakeMeasurer:
        """The process that was started last."""
        return self.processes[-1]

    def die(self, code: int = -signal.SIGKILL) -> None:
        """The process ends, and another is ready after the pause."""
        self.process.end(code)
        self.loop.advance(self.settings.restart_backoff_ms / 1_000)
        self.process.become_ready()

    def add(self, span: Span, task: str = "text") -> None:
        """Have records measured."""

        def act() -> None:
            self.measuring.add(task, span)
            self.measuring.send(self.held)

        self.loop.do(act)

    def discard(self, leases: set[Lease] | None = None, task: str = "text") -> list[Span]:
        """Take records back."""
        return self.loop.do(lambda: self.measuring.discard(task, leases))

    def lengths(self) -> list[list[int]]:
        """Those that were told, by span."""
        return [list(span.lengths or ()) for _, span in self.measured]

    def stop(self) -> None:
        """Stop; the process ends when it is told to."""
        stopping = self.loop.create_task(self.measuring.stop())
        self.loop.settle()
        for process in self.processes:
            if process.alive:
                assert process.told_to_stop or process.killed
                process.end(0)
        assert stopping.done()
        stopping.result()

    def close(self) -> None:
        """End whatever a test that failed has left."""
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.settle()
        self.loop.close()
        asyncio.set_event_loop(None)

    async def _launch(self, _: PoolSettings, *callbacks: Any) -> FakeMeasurer:
        if self.launches_to_fail:
            self.launches_to_fail -= 1
            raise OSError("no more processes")
        process = FakeMeasurer(self.loop, len(self.processes) + 1, *callbacks)
        self.processes.append(process)
        return process
