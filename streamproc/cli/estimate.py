"""``streamproc estimate``: measures what batches cost in time and memory, and writes it beside the settings."""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.markup import escape

from streamproc.cli.sample_records import SampleError, samples_of
from streamproc.cli.terminal import (
    ConfigOption,
    JsonOption,
    UsageError,
    count_of,
    print_json,
    print_table,
    say,
    stderr,
    stdout,
)
from streamproc.errors import StreamprocError

if TYPE_CHECKING:
    from streamproc.broker.declared_topics import DeclaredTopic
    from streamproc.estimate.measure import Measured
    from streamproc.settings import Settings

app = typer.Typer()

MAX_SAMPLES = 2_000
"""More records are not needed to make batches of; of more, so many are drawn."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@app.command(
    epilog="Example: streamproc estimate -c streamproc.yaml\n\n"
    "Example: streamproc estimate --task text --records texts.jsonl --memory-budget 2GiB --time-limit 300"
)
def estimate(
    *,
    config: ConfigOption = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="One task; all of them by default.")] = None,
    records: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON lines to make batches of, in place of the declared topics' samples."),
    ] = None,
    capture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A capture file, to take the records of the task's topics from.")
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What a worker may hold, as 2GiB; by default what limits it here."),
    ] = None,
    max_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The largest batch to try; by default batch.max_size.")
    ] = None,
    time_limit: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="How long to measure, about, for each task.")
    ] = 120.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Chooses the records and the shapes that are held out.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure what batches cost in time and memory, by their size and length, and say which limits follow.

    Runs the backend in a process of its own, with the environment that its workers will have, on batches of sample
    records that get larger until memory, the limit or the time ends it; that process may die of it. Writes
    TASK.estimate.json, which the processor reads, and TASK.estimate.html, with plots, into estimates_dir, which is the
    settings' folder by default. Touches no Kafka. Nothing else should load the machine meanwhile.
    """
    from streamproc.runtime.startup import declared_topics  # noqa: PLC0415 - --help needs none of it
    from streamproc.settings_loading import load_settings  # noqa: PLC0415 - as above

    budget_bytes = None if memory_budget is None else parse_size(memory_budget)
    settings = load_settings(config, os.environ)
    declared = declared_topics(settings)
    found = []
    for name, samples in _samples(settings, declared, records, capture, task).items():
        if not samples:
            raise SampleError(
                f"task {name} has no sample records: declare `samples` in its input topic's file, or give --records or "
                "--capture"
            )
        measured = _measure(
            settings,
            declared,
            name,
            samples,
            budget_bytes=budget_bytes,
            max_size=max_size,
            seconds=time_limit,
            seed=seed,
        )
        path = _write(settings, measured)
        found.append(measured)
        if not as_json:
            _show(measured, path)
    if as_json:
        print_json({it.how.task: it.estimate.model_dump(mode="json") for it in found})


def parse_size(text: str) -> int:
    """Bytes of ``2GiB``, ``512M``, ``1000000``. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip(), re.IGNORECASE)
    if match is None or (size := int(float(match[1]) * _UNITS[(match[2] or "").lower()])) < 1:
        raise UsageError(f"--memory-budget {text} is no size: write 2GiB, 512MiB or a number of bytes")
    return size


def _samples(
    settings: Settings,
    declared: dict[str, DeclaredTopic],
    records: Path | None,
    capture: Path | None,
    task: str | None,
) -> dict[str, list[dict[str, Any]]]:
    """Per task. Raises UsageError and SampleError."""
    if capture is None:
        return samples_of(settings, declared, records, task)
    if records is not None:
        raise UsageError("--records and --capture are two sources: give one of them")
    if task is not None and task not in settings.tasks:
        raise UsageError(f"there is no task {task}; the tasks are {', '.join(settings.tasks)}")
    return {name: _captured(settings, name, capture) for name in settings.tasks if task in (None, name)}


def _captured(settings: Settings, task: str, file: Path) -> list[dict[str, Any]]:
    """The values of a task's topics, those that are JSON objects; of many, some drawn evenly."""
    from streamproc.replay.capture_file import read_capture  # noqa: PLC0415 - --help needs none of it

    topics = settings.topics_of(task).inputs
    rng = random.Random(0)  # noqa: S311 - a choice of samples, no secret
    kept: list[bytes] = []
    seen = 0
    for record in read_capture(file):
        if record.topic not in topics or record.value is None:
            continue
        seen += 1
        if len(kept) < MAX_SAMPLES:
            kept.append(record.value)
        elif (place := rng.randrange(seen)) < MAX_SAMPLES:
            kept[place] = record.value
    found = []
    for value in kept:
        with contextlib.suppress(orjson.JSONDecodeError):  # a dead letter to the processor, and of no use here
            decoded = orjson.loads(value)
            if isinstance(decoded, dict):
                found.append(decoded)
    if not found:
        raise SampleError(f"{file} has no record of {', '.join(topics)} that is a JSON object")
    return found


def _measure(
    settings: Settings,
    declared: dict[str, DeclaredTopic],
    task: str,
    records: Sequence[dict[str, Any]],
    *,
    budget_bytes: int | None,
    max_size: int | None,
    seconds: float,
    seed: int,
) -> Measured:
    from streamproc.estimate.measure import measure  # noqa: PLC0415 - --help needs none of it
    from streamproc.estimate.prober import Prober  # noqa: PLC0415 - as above
    from streamproc.estimate.samples import Samples, measure_of  # noqa: PLC0415 - as above
    from streamproc.estimate.search import Search  # noqa: PLC0415 - as above
    from streamproc.runtime.startup import worker_setup  # noqa: PLC0415 - as above
    from streamproc.runtime.worker_process import worker_environment  # noqa: PLC0415 - as above

    batch = settings.tasks[task].batch
    if len(records) > MAX_SAMPLES:
        records = random.Random(seed).sample(records, MAX_SAMPLES)  # noqa: S311 - as above
    setup = worker_setup(settings, declared)
    if settings.tasks[task].input.format == "raw":
        raise SampleError(f"task {task} reads raw values, and batches to measure are made of JSON records")
    # Samples are JSON, whatever the task's formats are: what decoding another takes is not measured.
    others = ("warmup", "input_format", "output")
    runner = {key: value for key, value in setup["tasks"][task].items() if key not in others}
    topics = settings.topics_of(task).inputs
    environ = worker_environment(settings.pool, 0, os.environ)
    prober = Prober(
        {
            "backend": setup["backend"],
            "task": task,
            "topic": next(iter(runner["schemas"]), topics[0]),
            "runner": runner,
            "warmup": list(records[:1]),
        },
        environ,
        backend=settings.backend.path,
        load_timeout_s=settings.pool.initialize_timeout_s,
        batch_timeout_s=settings.pool.batch_timeout_s,
    )
    with _waiting(f"task {task}: loading {settings.backend.path}") as progress, prober:
        loaded = prober.start()
        try:
            samples = Samples(records, measure_of(batch.length, prober.length_of))
        except ValueError as error:
            raise SampleError(
                f"none of {len(records)} sample records of task {task} has a length by its batch.length "
                f"({batch.length_text}); mend the setting or the records"
            ) from error
        budget = _budget(settings, loaded.ceiling, budget_bytes, on_device=loaded.memory == "cuda")
        prober.budget_bytes = budget.size_bytes
        search = Search(
            prober,
            samples,
            max_size=max_size or batch.max_size,
            budget_bytes=budget.size_bytes,
            seconds=seconds,
            load_seconds=loaded.seconds,
            clock=time.monotonic,
            seed=seed,
            progress=lambda shape: progress(f"task {task}: {shape}"),
        )
        return measure(
            settings, task, search, samples, loaded, budget=budget, environ=environ, now=lambda: datetime.now(UTC)
        )


def _budget(settings: Settings, ceiling: tuple[int, str] | None, option_bytes: int | None, *, on_device: bool) -> Any:
    from streamproc.runtime.memory_budget import Budget, budget_of, group_bytes, machine_bytes  # noqa: PLC0415 - as above

    if on_device and option_bytes is None and ceiling is not None:
        return Budget(*ceiling)  # the host's limits say nothing of a device's memory
    return budget_of(
        option_bytes,
        settings.pool.max_worker_memory_mb,
        ceiling,
        settings.pool.workers,
        group_bytes=group_bytes(),
        machine_bytes=machine_bytes(),
    )


@contextlib.contextmanager
def _waiting(text: str) -> Iterator[Any]:
    """On a terminal, what is measured at the moment."""
    if not stderr.is_terminal:
        say(text)
        yield lambda _: None
        return
    with stderr.status(escape(text)) as status:
        yield lambda text: status.update(escape(text))


def _write(settings: Settings, measured: Measured) -> Path:
    from streamproc.estimate.page import html_page  # noqa: PLC0415 - as above
    from streamproc.runtime.estimate_file import write_estimate  # noqa: PLC0415 - as above
    from streamproc.runtime.estimates import estimate_path  # noqa: PLC0415 - as above

    path = estimate_path(settings, measured.how.task)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".html").write_text(html_page(measured), encoding="utf-8")
    except OSError as error:
        raise StreamprocError(f"{error.filename}: cannot be written ({error.strerror}); see estimates_dir") from error
    write_estimate(path, measured.estimate)
    return path


def _show(measured: Measured, path: Path) -> None:
    from streamproc.estimate.words import explained, length_column  # noqa: PLC0415 - as above
    from streamproc.replay.charts import number_text  # noqa: PLC0415 - as above

    it, how = measured.estimate, measured.how
    _line(f"{how.application}, task {how.task}: {count_of(how.samples, 'sample record')}")
    _line("")
    columns = (length_column(it.length), "best size", "records/s", "largest tried", "ended by")
    rows = [
        (f"{at.length:,}", at.best_size, number_text(at.per_s), f"{at.largest:,}", at.ended_by) for at in how.at_lengths
    ]
    print_table(columns, rows, right=columns[:4])
    _line("")
    for sentence in explained(measured):
        _line(sentence)
    _line("")
    _line(f"Written: {path}, and plots in {path.with_suffix('.html').name} beside it.")


def _line(text: str) -> None:
    stdout.print(text, markup=False, highlight=False, soft_wrap=stdout.width >= 1_000)
