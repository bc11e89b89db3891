"""The pool without processes: workers that a test plays, and an event loop whose time moves when the test says so."""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import orjson

from streamproc.records import Batch, Status
from streamproc.runtime.memory_limits import OutOfMemoryKills
from streamproc.runtime.pool import Pool, PoolEvents
from streamproc.runtime.wire import HEADER, Kind, encode_frame, reply_parts
from streamproc.runtime.worker_process import WorkerProcess
from streamproc.settings import PoolSettings

T = TypeVar("T")


class ManualLoop(asyncio.SelectorEventLoop):
    """Runs what is ready, never waits, and has a clock of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0

    def time(self) -> float:
        return self.now

    def do(self, act: Callable[[], T]) -> T:
        """Do something as a callback of the loop would, and all that follows from it at this time."""

        async def call() -> T:
            return act()

        done = self.run_until_complete(call())
        self.settle()
        return done

    def settle(self) -> None:
        """Run until nothing is left to do at this time."""
        for _ in range(100):
            # Stopping in the same turn keeps the selector from waiting for the next timer.
            self.call_soon(self.stop)
            self.run_forever()
            if not self._ready:  # type: ignore[attr-defined]  # asyncio has no public way to ask
                return
        raise AssertionError("it never comes to rest")

    def advance(self, seconds: float) -> None:
        """Let time pass; every timer comes at its time."""
        until = self.now + seconds
        while (due := self._next_timer()) is not None and due <= until:
            self.now = max(self.now, due)
            self.settle()
        self.now = until
        self.settle()

    def stand_still(self, seconds: float) -> None:
        """Let time pass as for a process that was stopped: every timer that came meanwhile comes late."""
        self.now += seconds
        self.settle()

    def timers(self) -> int:
        """How many timers are set."""
        return sum(not handle.cancelled() for handle in self._scheduled)  # type: ignore[attr-defined]  # as above

    def _next_timer(self) -> float | None:
        times = [it.when() for it in self._scheduled if not it.cancelled()]  # type: ignore[attr-defined]  # as above
        return min(times, default=None)


class FakeProcess(WorkerProcess):
    """A worker that does what the test says. ``held`` are the batches that it was sent and has not answered."""

    def __init__(self, loop: ManualLoop, number: int, settings: PoolSettings, index: int, *callbacks: Any) -> None:
        super().__init__(settings, *callbacks)
        self.index = index
        self.settings = settings
        self.number = number
        self.loop = loop
        self.held: deque[int] = deque()
        self.most_held = 0
        self.initialized = False
        self.ready = False
        self.connected = True
        self.deafened = False
        self.killed = False
        self.retired = False
        self.told_to_stop = False
        self.memory_bytes = 1_000_000
        self.looked_at = 0
        self.code: asyncio.Future[int] = loop.create_future()

    # -- what the pool asks of it

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
        elif kind == Kind.BATCH:
            self.held.append(head["id"])
            self.most_held = max(self.most_held, len(self.held))

    def resident_bytes(self) -> int | None:
        self.looked_at += 1
        return None if self.code.done() else self.memory_bytes

    def kill(self) -> bool:
        if self.code.done():
            return False
        self.killed = True
        return True

    async def wait(self) -> int:
        return await asyncio.shield(self.code)

    async def close(self) -> None:
        self.disconnect()
        self._release()

    # -- what the test has it do

    @property
    def alive(self) -> bool:
        return not self.code.done()

    @property
    def heard(self) -> bool:
        """Whether what it says arrives, and is listened to."""
        return self.connected and not self.deafened

    def say(self, kind: Kind, **head: Any) -> None:
        """Send a frame without a body."""
        self.send(encode_frame(kind, head))

    def send(self, data: bytes) -> None:
        """Write to the socket."""
        self.loop.do(lambda: self._receive(data))

    def babble(self, garbage: bytes) -> None:
        """Write what is no frame of ours; nothing that comes later is listened to."""
        self.deafened, self.ready = True, False
        self.send(garbage)

    def _receive(self, data: bytes) -> None:
        position = 0
        while position < len(data):
            buffer = self._receiver.get_buffer(-1)
            count = min(len(buffer), len(data) - position)
            buffer[:count] = data[position : position + count]
            self._receiver.buffer_updated(count)
            position += count

    def become_ready(self, ready: bool = True) -> None:
        """Say whether the backend is ready; the first time, that it is initialized."""
        self.initialized, self.ready = True, ready
        self.say(Kind.READY if ready else Kind.NOT_READY, initialize_s=0.5)

    def answer(self, failure: dict[str, str] | None = None) -> int:
        """Answer the batch that runs, of one record; its number."""
        number = self.held.popleft()
        if failure is not None:
            self.say(Kind.FAILED, id=number, failure=failure)
            return number
        head = {"id": number, "metrics": {}, "decode_ms": 0.0, "encode_ms": 0.0, "wall_ms": 0.0}
        self.send(encode_frame(Kind.REPLY, head, *reply_parts(bytes([Status.RESULT]), [b"{}"])))
        return number

    def end(self, code: int = -signal.SIGKILL) -> None:
        """End, as the kernel would tell it."""
        self.code.set_result(code)
        self.loop.settle()

    def disconnect(self) -> None:
        """Close the socket."""
        if self.connected:
            self.connected = False
            self._on_closed()

    def lose_socket(self) -> None:
        """Close the socket while it lives on."""
        self.loop.do(self.disconnect)


class Stage:
    """A pool with played workers, and everything that it told its owner."""

    def __init__(self, **settings: Any) -> None:
        self.loop = ManualLoop()
        asyncio.set_event_loop(self.loop)
        self.processes: list[FakeProcess] = []
        self.launches_to_fail = 0
        self.on_launch: Callable[[FakeProcess], None] = lambda _: None
        self.replies: list[int] = []
        self.failures: list[tuple[Batch, Any, bool, int]] = []
        self.restarts: list[str] = []
        self.fatal: list[Exception] = []
        self.rooms = 0
        self.events = PoolEvents(
            on_reply=lambda reply: self.replies.append(reply.batch.id),
            on_failed=lambda *told: self.failures.append(told),
            on_room=self._on_room,
            on_restart=self.restarts.append,
            on_fatal=self.fatal.append,
        )
        self.settings = PoolSettings.model_validate({"start_attempts": 1_000, **settings})

    def open(self, **seams: Any) -> Pool:
        """The pool, started."""
        seams = {"kills": OutOfMemoryKills(None), **seams}
        self.pool = Pool(self.settings, {}, self.events, self.loop.time, launch=self._launch, **seams)
        self.loop.run_until_complete(self.pool.start())
        self.loop.settle()
        return self.pool

    def submit(self, batch: Batch) -> None:
        self.loop.do(lambda: self.pool.submit(batch))

    def stop(self) -> None:
        """Stop the pool; whoever still lives ends when it is told to."""
        stopping = self.loop.create_task(self.pool.stop())
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

    def _on_room(self) -> None:
        self.rooms += 1

    async def _launch(self, *arguments: Any) -> WorkerProcess:
        if self.launches_to_fail:
            self.launches_to_fail -= 1
            raise OSError("no more processes")
        process = FakeProcess(self.loop, len(self.processes) + 1, *arguments)
        self.processes.append(process)
        self.on_launch(process)
        return process
