"""A worker process: loads the user's backend, then runs one batch after the other.

Started by the pool as a fresh interpreter, with its environment set before any import. It talks to the parent over one
socket (``wire``) and blocks on it: there is nothing else to do while it waits. It ends when the parent closes the
socket, says STOP, or dies.

Order: batches are answered in the order in which they came. Nothing is retried here. A record that cannot be decoded,
does not match its schema, gets a ``RecordError`` from the backend or cannot be encoded fails by itself; an exception of
the backend or a wrong number of outputs fails the batch, and the parent finds the culprit. Out of memory is such an
exception; where the kernel ends a process for it, this one goes before the parent, which Kafka's clients live in.

Invariant: a backend that is not ``ready()`` gets no batch that was sent after it said so.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import yaml

from streamproc.backend.models import declared_schemas
from streamproc.backend.record_error import RecordError
from streamproc.backend.tasks import resolve_task
from streamproc.errors import (
    BackendError,
    InferenceBackendRuntimeError,
    RegistryError,
    name_of_type,
    text_of,
)
from streamproc.formats.values import samples_in
from streamproc.loaders import load_backend
from streamproc.observe.logs import configure_logging, executing, frames_of
from streamproc.observe.trace_context import trace_id_of
from streamproc.observe.trace_scope import batch_span
from streamproc.records import NO_PARTITION, Cause, Failure, Status
from streamproc.runtime.child import child_main, start_failure
from streamproc.runtime.codec import Schema, shorten
from streamproc.runtime.cycles import CyclesBetweenBatches
from streamproc.runtime.decoders import decoder_for, registry_of
from streamproc.runtime.encoders import Encoder, encoder_for, envelope_for
from streamproc.runtime.failures import encode_failure
from streamproc.runtime.peak_memory import Peak, peak_of_backend
from streamproc.runtime.wire import (
    BATCHES_PER_WORKER,
    MAX_REPLY_VALUE_BYTES,
    BatchBody,
    Frame,
    Kind,
    Segment,
    are_metrics,
    decode_batch,
    read_frame,
    reply_parts,
    write_frame,
)

if TYPE_CHECKING:
    from streamproc.formats.registry import Registry

READY_POLL_S = 0.25
READY_CHECK_S = 5.0
MAX_TRACEBACKS = 20
TRACEBACK_LINES = 10
TRACEBACK_BYTES = 2_048
MAX_CHAIN = 10
_STEP = re.compile(r"^(preprocess|transform_inputs|execute|transform_outputs)\(\)")
_PACKAGE = str(Path(__file__).parents[1]) + os.sep

log = logging.getLogger("streamproc.worker")


@dataclass(slots=True)
class Reply:
    """The answer to one batch: per record a status byte and a value, and the metrics as JSON."""

    statuses: bytes
    values: Sequence[bytes]
    metrics: bytes
    codec_ms: tuple[float, float]


class BatchFailedError(Exception):
    """The batch as a whole failed; ``failure`` says why."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


class TaskRunner:
    """Runs the batches of one task: decode, check, backend, encode."""

    def __init__(
        self,
        name: str,
        backend: Callable[[list[dict[str, Any]]], Any],
        *,
        schemas: dict[str, Any],
        envelope: str,
        max_value_bytes: int,
        base_dir: str,
        input_format: str = "json",
        output: Mapping[str, Any] | None = None,
        registry: Registry | None = None,
    ) -> None:
        self._backend: Any = backend
        self._base_dir = base_dir
        self._decode = decoder_for(input_format, max_value_bytes, registry)
        self._encoder = encoder_for(output, registry)
        self._schemas = {topic: Schema(topic, schema) for topic, schema in schemas.items()}
        self._envelope = envelope_for(name, output) if envelope == "full" else None

    def run(
        self, spans: Sequence[tuple[str, int, int]], body: BatchBody, payload: memoryview, queued_ms: float
    ) -> Reply:
        """Run one batch; ``spans`` are (topic, partition, records), in the order of the body.

        Raises:
            BatchFailedError: the backend raised, or answered with something else than one output per record; or a
                schema cannot be had.
        """
        begun = time.perf_counter()
        try:
            self._encoder.prepare()
            decoded = self._decode(body.values, payload)
        except RegistryError as error:
            raise BatchFailedError(Failure(Cause.REGISTRY, "registry", "RegistryError", shorten(str(error)))) from error
        if self._schemas:
            self._check_schemas(spans, decoded)
        records = [record for record in decoded if type(record) is dict]
        decoded_at = time.perf_counter()
        outputs, metrics = self._run_backend(records) if records else ([], {"batch_size": 0})
        if "total_execution_time" in metrics:
            # packflow adds the steps up as they are; a sum of rounded numbers is none.
            metrics["total_execution_time"] = round(metrics["total_execution_time"], 5)
        metrics["queue_time"] = round(queued_ms, 5)
        encoded_from = time.perf_counter()
        encoded_metrics = orjson.dumps(metrics, default=str)
        statuses, values = self._encode(spans, body, decoded, outputs, encoded_metrics)
        codec_ms = ((decoded_at - begun) * 1_000, (time.perf_counter() - encoded_from) * 1_000)
        return Reply(statuses, values, encoded_metrics, codec_ms)

    def _check_schemas(self, spans: Sequence[tuple[str, int, int]], decoded: list[dict[str, Any] | Failure]) -> None:
        start = 0
        for topic, _, count in spans:
            schema = self._schemas.get(topic)
            if schema is not None:
                for index in range(start, start + count):
                    record = decoded[index]
                    if type(record) is dict and (failure := schema.check(record)) is not None:
                        decoded[index] = failure
            start += count

    def _run_backend(self, records: list[dict[str, Any]]) -> tuple[Sequence[Any], dict[str, Any]]:
        wanted = len(records)
        try:
            # A list of the user's own type may count otherwise than it iterates.
            outputs = list(self._backend(records))
            metrics: dict[str, Any] = self._backend.get_metrics().model_dump()
        except BaseException as error:
            # Cancellations and exits are the user's as well: the worker itself is ended by other means.
            raise BatchFailedError(_describe(error, self._base_dir)) from error
        if len(outputs) != wanted:
            message = f"the backend answered {len(outputs)} outputs for {wanted} records; return one per record"
            raise BatchFailedError(Failure(Cause.OUTPUT, "output", "WrongOutputCount", message))
        if not are_metrics(metrics):
            message = (
                "get_metrics() of the backend gives other times than milliseconds by step; return ExecutionMetrics"
            )
            raise BatchFailedError(Failure(Cause.OUTPUT, "output", "WrongMetrics", message))
        return outputs, metrics

    def _encode(
        self,
        spans: Sequence[tuple[str, int, int]],
        body: BatchBody,
        decoded: list[dict[str, Any] | Failure],
        outputs: Sequence[Any],
        metrics: bytes,
    ) -> tuple[bytes, list[bytes]]:
        results = _encode_outputs(outputs, self._encoder)
        if len(results) < len(decoded):
            remaining = iter(results)
            results = [record if isinstance(record, Failure) else next(remaining) for record in decoded]
        values = self._wrap(spans, body, [it if type(it) is bytes else b"" for it in results], metrics)
        statuses = bytearray(len(values))
        if set(map(type, results)) != {bytes}:
            for index, result in enumerate(results):
                if isinstance(result, Failure):
                    statuses[index] = Status.FAILED
                    values[index] = encode_failure(result)
        return bytes(statuses), values

    def _wrap(
        self, spans: Sequence[tuple[str, int, int]], body: BatchBody, results: list[bytes], metrics: bytes
    ) -> list[bytes]:
        if self._envelope is None:
            return results
        offsets, timestamps = body.offsets.tolist(), body.timestamps.tolist()
        values: list[bytes] = []
        start = 0
        for topic, partition, count in spans:
            part = slice(start, start + count)
            if partition == NO_PARTITION:  # the answer to a request is the parent's to write
                values += results[part]
            else:
                source = (topic, partition)
                values += self._envelope.wrap(results[part], metrics, source, offsets[part], timestamps[part])
            start += count
        return values


def _encode_outputs(outputs: Sequence[Any], encoder: Encoder) -> Sequence[bytes | Failure]:
    """Each output in the task's format, or why it has no such form."""
    if set(map(type, outputs)) == {dict}:
        encoded = encoder.encode_all(outputs)
        # One by one where anything is out of the ordinary: it says of which record, and why.
        if encoded is not None and sum(map(len, encoded)) <= MAX_REPLY_VALUE_BYTES // 2:
            return encoded
    return [_encode_output(output, encoder) for output in outputs]


def _encode_output(output: Any, encoder: Encoder) -> bytes | Failure:
    if type(output) is not dict:
        if isinstance(output, RecordError):
            return Failure(Cause.REJECTED, "execute", "RecordError", shorten(text_of(output.reason)))
        if not isinstance(output, dict):
            kind = name_of_type(output)
            message = f"the backend's output for this record is of type {kind}; return a dict or a RecordError"
            return Failure(Cause.OUTPUT, "output", "NotAnObject", message)
    try:
        encoded = encoder.encode(output)
    except BaseException as error:  # converting calls methods of the user's objects
        if _is_out_of_memory(error):
            raise
        message = shorten(f"the output has no {encoder.name} form: {text_of(error)}")
        return Failure(Cause.OUTPUT, "encode", name_of_type(error), message)
    if len(encoded) > MAX_REPLY_VALUE_BYTES // 2:
        return Failure(
            Cause.OUTPUT, "encode", "OutputTooLarge", f"the output is {len(encoded)} bytes as {encoder.name}"
        )
    return encoded


def _describe(error: BaseException, base_dir: str) -> Failure:
    """The step, the type and the sentence of an exception from the backend, with the line of the user's that raised."""
    # Not by truth, which an exception may define.
    raised = error if error.__cause__ is None else error.__cause__
    said = text_of(error)
    step = _STEP.match(said)
    name = step.group(1) if step else "execute"
    if raised is error and step is None and name_of_type(error) == InferenceBackendRuntimeError.__name__:
        # No step raised: the outputs are no list. By its name, since packflow's base class has a type of its own.
        return Failure(Cause.OUTPUT, "output", "NotAList", shorten(said))
    try:
        places = _own_frames(raised, base_dir)
    except BaseException:  # noqa: BLE001 - of code that was made from a text, with no file's name, say
        places = []
    if raised is error:
        text = said or f"{name_of_type(error)}()"
    else:
        place = f" at {places[-1][0]}:{places[-1][1]}" if places else ""
        text = f"{name}() raised {name_of_type(raised)}: {text_of(raised)}{place}"
    cause = Cause.OOM if _is_out_of_memory(raised) else Cause.EXCEPTION
    return Failure(cause, name, name_of_type(raised), shorten(text), _last_lines(raised, places))


def _own_frames(error: BaseException, base_dir: str) -> list[tuple[str, int, str, str]]:
    """File, line, function and text of the frames in the user's own code; or else in others'; or else in ours."""
    every = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in every if not frame.filename.startswith(_PACKAGE)]
    own = [frame for frame in theirs if frame.filename.startswith(base_dir + os.sep)] or theirs or every
    return [
        (os.path.relpath(frame.filename, base_dir), frame.lineno or 0, frame.name, frame.line or "") for frame in own
    ]


def _last_lines(error: BaseException, places: list[tuple[str, int, str, str]]) -> str:
    """The end of a traceback, for the dead letters."""
    try:
        said = traceback.format_exception_only(error)
    except BaseException:  # noqa: BLE001 - it looks at attributes, which an exception may define
        said = [f"{name_of_type(error)}: {text_of(error)}"]
    text = "".join((*traceback.format_list(places), *said))
    lines = text.encode("utf-8", "replace").splitlines()[-TRACEBACK_LINES:]
    return b"\n".join(lines)[-TRACEBACK_BYTES:].decode("utf-8", "ignore")


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, this process's or a device's; torch has a type for it, or only a sentence."""
    link: BaseException | None = error
    for _ in range(MAX_CHAIN):
        if link is None:
            return False
        kind = name_of_type(link)
        if isinstance(link, MemoryError) or kind == "OutOfMemoryError" or "CUDA out of memory" in text_of(link):
            return True
        link = link.__cause__
    return False


class Worker:
    """The process's loop over frames."""

    def __init__(self, connection: socket.socket, segments: Sequence[Segment]) -> None:
        self._connection = connection
        self._inbound = segments[:BATCHES_PER_WORKER]
        self._outbound = segments[BATCHES_PER_WORKER:]
        self._backend: Any = None
        self._runners: dict[str, TaskRunner] = {}
        self._declared: dict[str, dict[str, orjson.Fragment]] = {}
        self._threshold = 0
        self._replies = 0
        self._logged: set[tuple[str, str, str]] = set()
        self._ready = False
        self._ready_checked = 0.0
        self._peak: Peak | None = None
        self._highest = 0
        """The highest peak so far, for where peaks cannot be told apart."""

    def serve(self) -> int:
        """Run until the parent says stop; the process's exit code."""
        setup = read_frame(self._connection, 0)
        if setup is None or setup.kind is not Kind.SETUP:
            return 0
        configure_logging(sys.stderr, **setup.head["logging"], worker=setup.head["index"])
        begun = time.perf_counter()
        try:
            self._set_up(setup.head)
        except Exception as error:
            log.debug("the backend did not start", exc_info=error)
            write_frame(self._connection, Kind.START_FAILED, start_failure(error))
            return 1
        self._report_readiness({"initialize_s": time.perf_counter() - begun, "declared": self._declared}, first=True)
        cycles = CyclesBetweenBatches()
        while True:
            if not self._wait_for_frame():
                self._report_readiness({})
                continue
            frame = read_frame(self._connection, self._threshold)
            if frame is None or frame.kind is Kind.STOP:
                return 0
            self._answer(frame)
            cycles.look()

    def _set_up(self, head: dict[str, Any]) -> None:
        backend = head["backend"]
        self._backend = load_backend(**{**backend, "config": yaml.safe_load(backend["config"])})
        self._threshold = head["shared_memory_threshold_bytes"]
        registry = registry_of(head.get("registry"))
        for name, task in head["tasks"].items():
            runner = resolve_task(self._backend, name)
            self._declared[name] = declared_schemas(runner)
            warmup = task.pop("warmup")
            self._runners[name] = TaskRunner(name, runner, **task, registry=registry, base_dir=backend["base_dir"])
            if warmup:
                _warm_up(name, runner, samples_in(task.get("input_format", "json"), warmup))
        self._peak = peak_of_backend()

    def _wait_for_frame(self) -> bool:
        if self._ready and not self._has_ready:
            return True
        timeout = READY_CHECK_S if self._ready else READY_POLL_S
        return bool(select.select([self._connection], [], [], timeout)[0])

    @property
    def _has_ready(self) -> bool:
        return hasattr(self._backend, "ready")

    def _report_readiness(self, head: dict[str, Any], *, first: bool = False) -> None:
        self._ready_checked = time.monotonic()
        try:
            ready = not self._has_ready or bool(self._backend.ready())
        except Exception as error:  # noqa: BLE001 - the user's code; not ready is the safe reading
            log.warning("ready() raised %s: %s", name_of_type(error), text_of(error))
            ready = False
        if first or ready != self._ready:
            self._ready = ready
            write_frame(self._connection, Kind.READY if ready else Kind.NOT_READY, head)

    def _answer(self, frame: Frame) -> None:
        head = frame.head
        if (size := head.get("shared")) is not None:
            # Read where it is: the parent writes to this segment again only after the answer.
            frame.body = self._inbound[head["slot"]].view(size)
        count = sum(span[2] for span in head["spans"])
        executing(head["task"], head["id"], trace_id_of(head.get("traceparent")))
        started = time.monotonic()
        apart = self._peak is not None and self._peak.reset()
        try:
            body = decode_batch(frame.body, count)
            payload = memoryview(frame.body)[24 * count :]
            queued_ms = (started - head["opened_at"]) * 1_000
            with nullcontext() if (parent := head.get("traceparent")) is None else batch_span(parent):
                reply = self._runners[head["task"]].run(head["spans"], body, payload, queued_ms)
        except BaseException as error:  # noqa: BLE001 - neither a fault of ours nor the user's may cost the worker
            failure = error.failure if isinstance(error, BatchFailedError) else _describe(error, "")
            self._log_once(head["task"], failure, error)
            write_frame(self._connection, Kind.FAILED, {"id": head["id"], "failure": asdict(failure)})
            out_of_memory = failure.cause is Cause.OOM
        else:
            self._reply(head["id"], started, reply, self._peak_bytes(apart=apart))
            out_of_memory = False
        executing()
        if out_of_memory:
            gc.collect()  # what the traceback held of the batch, before the next one needs its place
        if self._has_ready and time.monotonic() - self._ready_checked > READY_CHECK_S:
            self._report_readiness({})

    def _log_once(self, task: str, failure: Failure, error: BaseException) -> None:
        """The traceback of each kind of failure, the first time; the parent logs every failure in a line."""
        seen = (task, failure.stage, failure.kind)
        level = logging.DEBUG
        if seen not in self._logged and len(self._logged) < MAX_TRACEBACKS:
            self._logged.add(seen)
            level = logging.WARNING
        # Ours around the pipeline's around the user's; not by truth, which an exception may define.
        for _ in range(2):
            error = error if error.__cause__ is None else error.__cause__
        try:
            frames = frames_of(error)
        except BaseException:  # noqa: BLE001 - an exception of the user's, or its code, may be unfit for that
            frames = ""
        details = {"cause": failure.cause, "stage": failure.stage, "error_type": failure.kind, "frames": frames}
        log.log(level, "task %s: the first of these: %s", task, failure.summary, extra=details)

    def _peak_bytes(self, *, apart: bool) -> int | None:
        """The most that was held since the batch began; None where that is not known."""
        if self._peak is None:
            return None
        seen = self._peak.read()
        known = apart or seen > self._highest
        self._highest = max(self._highest, seen)
        return seen if known else None

    def _reply(self, batch_id: int, started: float, reply: Reply, peak_bytes: int | None) -> None:
        head: dict[str, Any] = {
            "id": batch_id,
            "metrics": orjson.Fragment(reply.metrics),
            "decode_ms": reply.codec_ms[0],
            "encode_ms": reply.codec_ms[1],
            "peak_bytes": peak_bytes,
            "peak_of": None if self._peak is None else self._peak.kind,
            "wall_ms": (time.monotonic() - started) * 1_000,
        }
        parts, size = reply_parts(reply.statuses, reply.values)
        if size >= self._threshold:
            slot = self._replies % BATCHES_PER_WORKER
            self._replies += 1
            self._outbound[slot].write(parts, size)
            write_frame(self._connection, Kind.REPLY, {**head, "slot": slot, "shared": size})
        else:
            write_frame(self._connection, Kind.REPLY, head, parts, size)


def _warm_up(task: str, runner: Callable[[list[dict[str, Any]]], Any], records: list[dict[str, Any]]) -> None:
    where = f"the warm-up of task {task} on {len(records)} sample records failed"
    try:
        count = len(list(runner(records)))
    except Exception as error:
        raise BackendError(f"{where}: {text_of(error)}") from error
    if count != len(records):
        raise BackendError(f"{where}: the backend answered {count} outputs; return one per record")


def main() -> None:
    """The entry of a worker process: the descriptors of its socket and of its segments are its arguments."""
    child_main(lambda connection, segments: Worker(connection, segments).serve())
