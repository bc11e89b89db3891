"""What a worker's batch comes to, whatever the backend returns or raises."""

from __future__ import annotations

import asyncio
import socket
import sys
import types
from collections.abc import Callable
from typing import Any, Literal, cast

import orjson
import pytest

from streamproc import InferenceBackend, RecordError
from streamproc.records import Cause, Span, Status, value_sizes
from streamproc.runtime.failures import decode_failure, failure_of
from streamproc.runtime.wire import Frame, FrameReceiver, Kind, batch_parts, decode_reply
from streamproc.runtime.worker import TaskRunner, Worker
from tests.support.spans import FakeRecord, lease


class Unprintable(Exception):  # noqa: N818 - also used as a value
    def __str__(self) -> str:
        raise Unprintable

    __repr__ = __str__


class Untrue(Exception):  # noqa: N818 - its truth is what matters
    def __bool__(self) -> bool:
        raise KeyboardInterrupt


class Miscounted(list[Any]):
    def __len__(self) -> int:
        return 2


class Scripted(InferenceBackend):
    def __init__(self, script: Callable[[list[Any]], Any], metrics: Any = None) -> None:
        super().__init__()
        self.script = script
        self.metrics = metrics

    def execute(self, inputs: list[Any]) -> Any:
        return self.script(inputs)

    def get_metrics(self) -> Any:
        return super().get_metrics() if self.metrics is None else types.SimpleNamespace(model_dump=lambda: self.metrics)


class Sent:
    """The worker's end of the socket."""

    def __init__(self) -> None:
        self.data = b""

    def sendall(self, data: bytes) -> None:
        self.data += data


def answer(backend: InferenceBackend, count: int = 2) -> Frame:
    """The one frame with which a worker answers a batch of so many records."""
    sent = Sent()
    worker = Worker(cast("socket.socket", sent), [])
    runner = TaskRunner("text", backend, schemas={}, envelope="result", max_value_bytes=100, base_dir="/nowhere")
    worker._runners["text"] = runner
    worker._threshold = 10**6
    rows = [FakeRecord(offset=index, value=b'{"id":%d}' % index) for index in range(count)]
    parts, _ = batch_parts([Span(lease(), 0, rows, value_sizes(rows), 0.0)])
    head = {"id": 1, "task": "text", "opened_at": 0.0, "spans": [("in", 0, count)]}
    worker._answer(Frame(Kind.BATCH, head, b"".join(parts)))
    frames: list[Frame] = []
    whys: list[str] = []
    receiver = FrameReceiver(frames.append, whys.append, lambda: None, max_body_bytes=10**6)
    for byte in sent.data:
        receiver.get_buffer(-1)[0] = byte
        receiver.buffer_updated(1)
    assert whys == []
    (frame,) = frames
    return frame


def raising(error: BaseException) -> Callable[[list[Any]], Any]:
    def script(_: list[Any]) -> Any:
        raise error

    return script


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        asyncio.CancelledError(),
        GeneratorExit(),
        SystemExit(3),
        BaseExceptionGroup("several", [SystemExit(1)]),
        Unprintable(),
        Untrue(),
        ValueError(Unprintable()),
        ValueError("\ud800" * 5_000),
        type("N" * 100_000, (Exception,), {})(),
        ExceptionGroup("several", [Unprintable()]),
    ],
    ids=lambda error: type(error).__name__[:20],
)
def test_whatever_is_raised_fails_the_batch_with_a_sentence_and_not_the_worker(error: BaseException) -> None:
    frame = answer(Scripted(raising(error)))
    assert frame.kind is Kind.FAILED
    failure = failure_of(frame.head["failure"])
    assert (failure.cause, failure.stage) == (Cause.EXCEPTION, "execute")
    assert failure.kind == type(error).__name__[:100]
    assert 0 < len(failure.message) <= 1_000
    assert 0 < len(failure.traceback.encode()) <= 2_048


def test_an_exception_whose_frames_have_no_file_fails_the_batch_as_any_other() -> None:
    def script(_: list[Any]) -> Any:
        exec(compile("raise ValueError('made up')", "", "exec"), {})  # noqa: S102 - as some templates do

    failure = failure_of(answer(Scripted(script)).head["failure"])
    assert (failure.cause, failure.kind) == (Cause.EXCEPTION, "ValueError")
    assert failure.message == "execute() raised ValueError: made up"
    assert failure.traceback == "ValueError: made up"


@pytest.mark.parametrize("outputs", [Miscounted([{}, {}, {}]), Miscounted([{}]), [{}], [{}] * 3])
def test_outputs_are_counted_by_what_they_hold(outputs: list[Any]) -> None:
    frame = answer(Scripted(lambda _: outputs))
    assert frame.kind is Kind.FAILED
    failure = failure_of(frame.head["failure"])
    assert (failure.cause, failure.kind) == (Cause.OUTPUT, "WrongOutputCount")


def test_a_backend_that_takes_records_out_of_its_inputs_has_answered_too_few() -> None:
    def script(inputs: list[Any]) -> Any:
        del inputs[0]
        return inputs

    frame = answer(Scripted(script))
    assert frame.kind is Kind.FAILED
    assert failure_of(frame.head["failure"]).kind == "WrongOutputCount"


@pytest.mark.parametrize(
    "metrics",
    [
        {"execution_times": [1]},
        {"execution_times": {"execute": "long"}},
        {"execution_times": {1: 2}},
        {"total_execution_time": "long"},
        {"mine": Unprintable()},
        [],
    ],
)
def test_metrics_that_the_parent_could_not_count_fail_the_batch(metrics: Any) -> None:
    assert answer(Scripted(lambda inputs: inputs, metrics)).kind is Kind.FAILED


@pytest.mark.parametrize(
    ("output", "cause", "kind"),
    [
        (RecordError(cast("str", Unprintable())), Cause.REJECTED, "RecordError"),
        ({"a": 10**5000}, Cause.OUTPUT, "TypeError"),
        (type("N" * 100_000, (), {})(), Cause.OUTPUT, "NotAnObject"),
    ],
    ids=["reason", "number", "name"],
)
def test_an_odd_output_fails_alone(output: Any, cause: Cause, kind: str) -> None:
    frame = answer(Scripted(lambda _: [output, {"good": 1}]))
    assert frame.kind is Kind.REPLY
    statuses, values, _ = decode_reply(frame.body, [2])
    assert list(statuses) == [Status.FAILED, Status.RESULT]
    failure = decode_failure(values[0])
    assert (failure.cause, failure.kind) == (cause, kind)
    assert 0 < len(failure.message) <= 1_000
    assert orjson.loads(values[1]) == {"good": 1}


class Tensor:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def numel(self) -> int:
        raise self.error


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(Tensor=Tensor, FloatTensor=Tensor, IntTensor=Tensor)
    monkeypatch.setitem(sys.modules, "torch", cast("types.ModuleType", module))
    monkeypatch.setattr(Tensor, "__module__", "torch")


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    "error", [RuntimeError("no"), KeyboardInterrupt(), Unprintable()], ids=lambda error: type(error).__name__
)
def test_an_object_that_raises_while_it_is_converted_fails_alone(error: BaseException) -> None:
    frame = answer(Scripted(lambda _: [{"a": Tensor(error)}, {"good": 1}]))
    statuses, values, _ = decode_reply(frame.body, [2])
    assert list(statuses) == [Status.FAILED, Status.RESULT]
    assert decode_failure(values[0]).cause is Cause.OUTPUT


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("error", [MemoryError("no more"), RuntimeError("CUDA out of memory")])
def test_memory_that_runs_out_while_an_output_is_converted_fails_the_batch_for_that(error: Exception) -> None:
    frame = answer(Scripted(lambda _: [{"a": Tensor(error)}, {"good": 1}]))
    assert frame.kind is Kind.FAILED
    assert failure_of(frame.head["failure"]).cause is Cause.OOM


class FakePeak:
    """Peaks of its own choosing, which may not be told apart."""

    kind: Literal["host", "cuda"] = "host"

    def __init__(self, *, apart: bool) -> None:
        self.apart = apart
        self.peaks = iter([50, 70, 70, 60, 80])

    def reset(self) -> bool:
        return self.apart

    def read(self) -> int:
        return next(self.peaks)


@pytest.mark.parametrize(("apart", "told"), [(True, [50, 70, 70, 60, 80]), (False, [50, 70, None, None, 80])])
def test_a_peak_is_told_where_it_is_known_to_be_of_the_batch(*, apart: bool, told: list[int | None]) -> None:
    worker = Worker(cast("socket.socket", Sent()), [])
    worker._peak = cast("Any", FakePeak(apart=apart))
    assert [worker._peak_bytes(apart=apart) for _ in told] == told
