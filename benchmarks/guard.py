"""A guard against slow growth: what each stage does for a record, counted and not timed, against figures kept here.

    python -m benchmarks.guard            compare with benchmarks/guard.json; exit code 1 where something grew
    python -m benchmarks.guard --write    take the figures of now as those to compare with

Counted are Python's instructions and its calls into C, by the module that does them, over a whole processor: source to
ledger, over the in-memory broker, with the real pool, wire and worker code in one process, in an event loop whose time
moves only when nothing is left to do. The same is counted of the preprocessors. What C code itself copies is no
instruction of Python's: for that there is the peak of memory, with values of 10 KB, where one more copy of what is in
flight shows. Everything is the same on every machine for one minor version of Python, whatever else it is doing.

A figure is what 8,192 records more add, so that starting and stopping do not count. It may grow by 15 %.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import selectors
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.preprocessors import BATCH, preprocessor_cases
from benchmarks.workloads import small_value
from streamproc.backend import pipeline
from streamproc.broker.memory import MemoryBroker
from streamproc.records import TopicPartition
from streamproc.runtime import worker
from streamproc.runtime.processor import Processor
from streamproc.runtime.startup import worker_setup
from streamproc.runtime.wire import BATCHES_PER_WORKER, Frame, FrameReceiver, Kind, Segment, read_frame
from streamproc.runtime.worker import Worker
from streamproc.settings import PoolSettings, Settings
from streamproc.testing.topics import create_topics

FIGURES = Path(__file__).with_name("guard.json")
ALLOWED = 1.15
NEGLIGIBLE = 0.05
"""Figures grow by less than this unnoticed: a twentieth of an instruction a record."""
FEWER, MORE = 4_096, 12_288
LARGE_VALUE_BYTES, LARGE_RECORDS = 10_000, 2_048
COMPILED = "<streamproc"
"""Code that streamproc compiles itself says so in place of its file."""
ACCEPT = "if that is as it should be, run `python -m benchmarks.guard --write` and commit benchmarks/guard.json"
_ROOT = Path(__file__).parents[1] / "streamproc"
_NOT_OURS = ("broker/memory", "testing/")
"""The broker that stands in for Kafka; its own cost is nobody's."""

Figures = dict[str, dict[str, float]]


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits: where nothing is left to do it is the time of the next timer."""

    def __init__(self) -> None:
        super().__init__(_NeverWaiting(self))
        self.now = 1_000.0

    def time(self) -> float:
        """Seconds since some moment."""
        return self.now


class _NeverWaiting(selectors.SelectSelector):
    def __init__(self, loop: JumpingLoop) -> None:
        super().__init__()
        self._jumping = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing is left to happen"
            self._jumping.now += timeout
        return ready


class InlineWorker:
    """The worker's own code, in this process: what the pool writes is answered in the next turn of the loop."""

    def __init__(self, settings: PoolSettings, on_frame: Callable[[Frame], None]) -> None:
        self.pid = os.getpid()
        self.returncode: int | None = None
        self.segments = [Segment.create() for _ in range(2 * BATCHES_PER_WORKER)]
        self._threshold = settings.shared_memory_threshold_bytes
        self._receiver = FrameReceiver(on_frame, _refuse, _nothing, max_body_bytes=self._threshold)
        connection: Any = self
        self._worker = Worker(connection, self.segments)
        self._inbound = memoryview(b"")
        self._ended = asyncio.Event()

    @classmethod
    async def launch(
        cls,
        settings: PoolSettings,
        _index: int,
        on_frame: Callable[[Frame], None],
        _on_garbage: Callable[[str], None],
        _on_closed: Callable[[], None],
    ) -> InlineWorker:
        """As ``WorkerProcess.launch``."""
        return cls(settings, on_frame)

    def write(self, frame: bytes) -> None:
        """As the socket would have it."""
        asyncio.get_running_loop().call_soon(self._take, frame)

    def _take(self, written: bytes) -> None:
        at_work = self._worker
        self._inbound = memoryview(written)
        connection: Any = self
        frame = read_frame(connection, self._threshold)
        assert frame is not None
        if frame.kind is Kind.SETUP:
            at_work._set_up(frame.head)  # noqa: SLF001 - its own loop blocks
            at_work._report_readiness({"initialize_s": 0.0}, first=True)  # noqa: SLF001 - as above
        elif frame.kind is Kind.STOP:
            self.kill()
        else:
            at_work._answer(frame)  # noqa: SLF001 - as above

    def recv_into(self, buffer: memoryview) -> int:
        """The worker's end of the socket."""
        count = min(len(buffer), len(self._inbound))
        buffer[:count] = self._inbound[:count]
        self._inbound = self._inbound[count:]
        return count

    def sendall(self, data: bytes) -> None:
        """As ``recv_into``."""
        rest = memoryview(data)
        while rest:
            buffer = self._receiver.get_buffer(-1)
            count = min(len(buffer), len(rest))
            buffer[:count] = rest[:count]
            self._receiver.buffer_updated(count)
            rest = rest[count:]

    def resident_bytes(self) -> int | None:
        """Unknown."""
        return None

    def kill(self) -> bool:
        """Over at once."""
        was_running, self.returncode = self.returncode is None, 0
        self._ended.set()
        return was_running

    async def wait(self) -> int:
        """Until it was told to stop."""
        await self._ended.wait()
        return 0

    async def close(self) -> None:
        """Give the memory back."""
        for segment in self.segments:
            segment.close()


def _refuse(why: str) -> None:
    raise AssertionError(why)


def _nothing() -> None:
    """Nobody asks."""


class Tally:
    """Instructions and calls into C, by module."""

    def __init__(self) -> None:
        self.instructions: Counter[CodeType] = Counter()
        self.c_calls: Counter[CodeType] = Counter()
        self._ours: dict[CodeType, bool] = {}

    @contextmanager
    def counting(self) -> Iterator[Tally]:
        """Within the block everything counts."""
        before = sys.gettrace(), sys.getprofile()
        sys.settrace(self._trace)
        sys.setprofile(self._profile)
        try:
            yield self
        finally:
            sys.settrace(before[0])
            sys.setprofile(before[1])

    def by_module(self) -> dict[str, tuple[int, int]]:
        """Both, of each module."""
        found: dict[str, tuple[int, int]] = {}
        for code in self.instructions:
            instructions, c_calls = found.get(module_of(code), (0, 0))
            found[module_of(code)] = (instructions + self.instructions[code], c_calls + self.c_calls[code])
        return found

    def _is_ours(self, code: CodeType) -> bool:
        known = self._ours.get(code)
        if known is None:
            module = module_of(code)
            known = self._ours[code] = module != "" and not module.startswith(_NOT_OURS)
        return known

    def _trace(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event != "call" or not self._is_ours(frame.f_code):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._count

    def _count(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "opcode":
            self.instructions[frame.f_code] += 1
        return self._count

    def _profile(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event == "c_call" and self._is_ours(frame.f_code):
            self.c_calls[frame.f_code] += 1


def module_of(code: CodeType) -> str:
    """``runtime/ledger`` for what stands in streamproc/runtime/ledger.py; nothing for what is not ours."""
    if code.co_filename.startswith(COMPILED):
        return "backend/compiled for a configuration"
    path = Path(code.co_filename)
    return path.relative_to(_ROOT).with_suffix("").as_posix() if path.is_relative_to(_ROOT) else ""


def run_processor(records: int, value_of: Callable[[int], bytes], tally: Tally | None = None) -> int:
    """Take so many records through a whole processor; the peak of memory in bytes, where it is traced."""
    settings = Settings.model_validate(
        {
            "name": "guard",
            "backend": {"path": "identity:Backend", "base_dir": str(Path(__file__).parent)},
            "tasks": {"main": {"input": {"topics": ["in"]}, "batch": {"max_size": BATCH}}},
            "logging": {"level": "error"},
            "topics_dir": tempfile.gettempdir() + "/none",
        }
    )
    with asyncio.Runner(loop_factory=JumpingLoop) as runner, ExitStack() as patches:
        loop = runner.get_loop()
        # The worker asks for the time by itself; on a slow machine it would tell more often that it is ready.
        for module in (pipeline, worker):
            stopped = SimpleNamespace(monotonic=loop.time, perf_counter=loop.time)
            patches.enter_context(mock.patch.dict(vars(module), {"time": stopped}))
        broker = MemoryBroker(clock=lambda: 1_700_000_000.0 + loop.time())

        async def run() -> int:
            await create_topics(settings, broker.admin())
            partitions = broker.partitions_of("in")
            processor = Processor(
                settings,
                worker_setup(settings, {}),
                broker,
                clock=loop.time,
                wall_clock=lambda: 1_700_000_000.0 + loop.time(),
                rng=random.Random(1),
            )
            processor.pool._launch = InlineWorker.launch  # type: ignore[assignment]  # noqa: SLF001 - no process
            await processor.start()
            await processor.until_ready()
            for index in range(records):
                broker.append("in", value_of(index), partition=index % partitions)
            tracemalloc.reset_peak()

            def committed() -> int:
                found = broker.committed(settings.group_of("main"))
                return sum(found.get(TopicPartition("in", number), 0) for number in range(partitions))

            async def until_settled() -> None:
                while committed() < records:
                    assert processor.failure is None, processor.failure
                    await asyncio.sleep(0.01)

            before = tracemalloc.get_traced_memory()[0]
            if tally is None:
                await until_settled()
            else:
                # Tasks that run already are traced too: each of their frames is entered anew.
                with tally.counting():
                    await until_settled()
            peak = tracemalloc.get_traced_memory()[1] - before
            results = sum(len(broker.records(topic)) for topic in [settings.topics_of("main").results])
            assert results == records, f"{results} results of {records} records"
            await processor.stop()
            return peak

        return runner.run(run())


def processor_figures() -> Figures:
    """What a record takes in each module."""
    fewer, more = Tally(), Tally()
    run_processor(FEWER, small_value, fewer)
    run_processor(MORE, small_value, more)
    before, after = fewer.by_module(), more.by_module()
    figures: Figures = {}
    for module in sorted(after):
        first, second = before.get(module, (0, 0)), after[module]
        figures[module] = _rounded(
            instructions=(second[0] - first[0]) / (MORE - FEWER), c_calls=(second[1] - first[1]) / (MORE - FEWER)
        )
    return {module: both for module, both in figures.items() if max(both.values()) >= NEGLIGIBLE}


def preprocessor_figures() -> Figures:
    """What a record takes in each case of the preprocessors' benchmark, once the preprocessor knows its records."""
    figures: Figures = {}
    for case in preprocessor_cases():
        case.ours()
        tally = Tally()
        with tally.counting():
            case.ours()
        both = tally.by_module().values()
        figures[f"preprocess: {case.name}"] = _rounded(
            instructions=sum(instructions for instructions, _ in both) / BATCH,
            c_calls=sum(c_calls for _, c_calls in both) / BATCH,
        )
    return figures


def memory_figures() -> Figures:
    """Peak of memory while values of 10 KB go through, beside the broker's, for a byte of the values."""
    content = os.urandom(LARGE_VALUE_BYTES // 2 - 20).hex()
    tracemalloc.start()
    try:
        run_processor(BATCH, lambda index: b'{"id":%d,"pad":"%b"}' % (index, content.encode()))
        # Else what the first run left is cleared away before the second one's peak or after it, as chance has it.
        gc.collect()
        peak = run_processor(LARGE_RECORDS, lambda index: b'{"id":%d,"pad":"%b"}' % (index, content.encode()))
    finally:
        tracemalloc.stop()
    return {"memory, values of 10 KB": _rounded(peak_bytes_a_byte=peak / LARGE_RECORDS / LARGE_VALUE_BYTES)}


def _rounded(**figures: float) -> dict[str, float]:
    return {name: round(figure, 3) for name, figure in figures.items()}


def measure() -> Figures:
    """All figures of now."""
    return {**processor_figures(), **preprocessor_figures(), **memory_figures()}


def grown(kept: Mapping[str, Mapping[str, float]], now: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence for each figure that grew by more than it may, or that is new."""
    found = []
    for stage, figures in now.items():
        for name, figure in figures.items():
            before = kept.get(stage, {}).get(name, 0.0)
            if figure > before * ALLOWED and figure - before > NEGLIGIBLE:
                more = f"{figure / before - 1:+.0%}" if before else "new"
                found.append(f"{stage}: {name.replace('_', ' ')} a record went from {before:g} to {figure:g} ({more})")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Compare or write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="take the figures of now as those to compare with")
    told = parser.parse_args(arguments)
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    now = measure()
    if told.write:
        FIGURES.write_text(json.dumps({"python": minor, "figures": now}, indent=1) + "\n")
        print(f"wrote {FIGURES}")
        return 0
    kept = json.loads(FIGURES.read_text())
    if kept["python"] != minor:
        print(f"the figures are of Python {kept['python']}; another has other instructions")
        return 1
    sentences = grown(kept["figures"], now)
    if sentences:
        print("\n".join([*sentences, ACCEPT]))
        return 1
    for stage, figures in now.items():
        print(f"{stage:<45} " + ", ".join(f"{figure:g} {name.replace('_', ' ')}" for name, figure in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
