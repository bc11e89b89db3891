"""The process that estimates run batches in: it loads the backend and runs what it is told, and may die of it.

A batch goes through ``TaskRunner``, as in a worker: decoding, schema, backend, encoding. So its time is what the
processor will see, and its memory that of a worker.

It reads lines of JSON and answers each with one, on what was standard output at the start; what the backend prints goes
to standard error. The first line is the setup, each other one a batch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import packages_distributions, version
from typing import Any, NamedTuple

import orjson
import yaml

from streamproc.runtime.heap import keep_freed_memory
from streamproc.runtime.parent_death import die_with_parent


class _Batch(NamedTuple):
    spans: list[tuple[str, int, int]]
    body: Any
    payload: memoryview


def main() -> None:
    """The child's entry."""
    die_with_parent()
    keep_freed_memory()  # as a worker does: it is part of what one holds
    # Ctrl-C reaches the whole terminal group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def answer(fields: dict[str, Any]) -> None:
        answers.write(orjson.dumps(fields, default=str) + b"\n")

    setup = orjson.loads(sys.stdin.buffer.readline())
    try:
        begun = time.perf_counter()
        known = set(sys.modules)
        length_of, runner = _load(setup)
        from streamproc.runtime.peak_memory import peak_of_backend  # noqa: PLC0415 - as in _load
        from streamproc.runtime.worker import BatchFailedError  # noqa: PLC0415 - as above

        with contextlib.suppress(BatchFailedError):  # what fails here fails again when it is measured
            _run(runner, _batch(setup["topic"], setup["warmup"]))
        peak = peak_of_backend()
        ceiling = peak.ceiling()
        answer(
            {
                "event": "loaded",
                "seconds": time.perf_counter() - begun,
                "memory": peak.kind,
                "idle_bytes": peak.now(),
                "ceiling": ceiling,
                "libraries": _libraries(set(sys.modules) - known),
            }
        )
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the user's code raises is told to the parent
        answer({"event": "failed", "message": _described(error)})
        return
    for line in sys.stdin.buffer:
        request = orjson.loads(line)
        if "length_of" in request:
            answer(_length(length_of, request["length_of"]))
        else:
            answer(_measure(runner, peak, setup["topic"], **request))


def _load(setup: dict[str, Any]) -> tuple[Any, Any]:
    """What tells a record's length, made when it is asked first, and what runs the task's batches."""
    from streamproc.backend.tasks import resolve_task  # noqa: PLC0415 - inside the try, as the user's code is
    from streamproc.loaders import load_backend  # noqa: PLC0415 - as above
    from streamproc.runtime.lengths import of_backend  # noqa: PLC0415 - as above
    from streamproc.runtime.worker import TaskRunner  # noqa: PLC0415 - as above

    backend = setup["backend"]
    loaded = load_backend(**{**backend, "config": yaml.safe_load(backend["config"])})
    task = resolve_task(loaded, setup["task"])
    length_of = cache(lambda: of_backend(loaded, setup["task"]))
    return length_of, TaskRunner(setup["task"], task, **setup["runner"], base_dir=backend["base_dir"])


def _batch(topic: str, records: list[dict[str, Any]]) -> _Batch:
    from streamproc.runtime.wire import BatchBody  # noqa: PLC0415 - after the backend's own imports

    values = [orjson.dumps(record) for record in records]
    payload = memoryview(b"".join(values))
    views, start = list[memoryview | None](), 0
    for value in values:
        views.append(payload[start : start + len(value)])
        start += len(value)
    numbers = memoryview(array("q", range(len(values))))
    return _Batch([(topic, 0, len(values))], BatchBody(views, numbers, numbers), payload)


def _run(runner: Any, batch: _Batch) -> int:
    """Run a batch once; how many of its records failed by themselves."""
    from streamproc.records import Status  # noqa: PLC0415 - as above

    reply = runner.run(batch.spans, batch.body, batch.payload, 0.0)
    return int(reply.statuses.count(Status.FAILED))


def _measure(
    runner: Any,
    peak: Any,
    topic: str,
    *,
    records: list[dict[str, Any]],
    batches: list[list[int]],
    runs: int,
    seconds: float,
    fresh: bool,
) -> dict[str, Any]:
    """Run batches of the records at these places: the first once for its memory alone, then all for their times."""
    from streamproc.records import Cause  # noqa: PLC0415 - as above
    from streamproc.runtime.peak_memory import release_memory  # noqa: PLC0415 - as above
    from streamproc.runtime.worker import BatchFailedError  # noqa: PLC0415 - as above

    made = [_batch(topic, [records[place] for place in places]) for places in batches]
    if fresh:
        release_memory()
    try:
        peak.reset()
        failed = _run(runner, made[0])
        times = list(_times_ms([partial(_run, runner, it) for it in made], runs, seconds))
    except BatchFailedError as error:
        if error.failure.cause is Cause.OOM:
            return {"event": "out_of_memory"}
        return {"event": "failed", "message": error.failure.message}
    except MemoryError:
        return {"event": "out_of_memory"}
    return {"event": "ran", "times_ms": times, "peak_bytes": peak.read(), "failed": failed}


def _length(length_of: Callable[[], Callable[[Any], Any]], record: dict[str, Any]) -> dict[str, Any]:
    """How long the backend says that a record is."""
    try:
        return {"event": "length", "length": int(length_of()(record))}
    except Exception as error:  # noqa: BLE001 - whatever the user's code raises is told to the parent
        return {"event": "failed", "message": _described(error)}


def _times_ms(runs_of: Sequence[Callable[[], object]], runs: int, seconds: float) -> Iterator[float]:
    """The times of so many runs, in turn, or of those that begin within so many seconds; of one at least."""
    until = time.perf_counter() + seconds
    for number in range(runs):
        begun = time.perf_counter()
        if number and begun >= until:
            return
        runs_of[number % len(runs_of)]()
        yield (time.perf_counter() - begun) * 1_000


def _libraries(modules: set[str]) -> dict[str, str]:
    """The installed packages that the backend has brought, and their versions."""
    packages = packages_distributions()
    tops = {name.partition(".")[0] for name in modules}
    names = {package for top in tops for package in packages.get(top, ())}
    return {name: version(name) for name in sorted(names) if name != "streamproc"}


def _described(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if type(error).__module__.startswith("streamproc") else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
