"""``streamproc check``: everything that can be known without Kafka, before a processor is started."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Self

import orjson
import typer
from rich.markup import escape
from rich.table import Table

from streamproc.cli.sample_records import samples_of
from streamproc.cli.terminal import ConfigOption, JsonOption, count_of, print_json, show, stderr
from streamproc.errors import BackendError, InferenceBackendLoadError, SettingsError, StreamprocError

if TYPE_CHECKING:
    from streamproc.broker.declared_topics import DeclaredTopic
    from streamproc.settings import BatchSettings, Settings
    from streamproc.settings_loading import Loaded

app = typer.Typer()

_CHECK_WIDTH = 16


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked: ``ok``, a ``warning``, ``failed``, or ``skipped`` for want of something to run."""

    check: str
    status: str
    detail: str


@app.command(
    epilog="Example: streamproc check -c streamproc.yaml\n\n"
    "Example: streamproc check --records samples.jsonl --task text --json"
)
def check(
    *,
    config: ConfigOption = None,
    records: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON lines to run, in place of the declared topics' samples."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="The task that --records are for, where there are several.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check settings, declared topics and their schemas, then load the backend and run sample records through it.

    Touches no Kafka. The backend runs in a process of its own, with the environment that its workers will have.
    """
    report = _Report(quiet=as_json)
    failure: StreamprocError | None = None
    try:
        _check(report, config, records, task)
    except StreamprocError as error:
        failure = error
        report.failed(error)
    finally:
        report.stop_waiting()
    if as_json:
        print_json({"ok": failure is None, "checks": [asdict(finding) for finding in report.findings]})
    if failure is not None:
        raise failure


class _Report:
    """What was found so far; each finding is shown when it is there, and on a terminal what is being waited for."""

    def __init__(self, *, quiet: bool) -> None:
        self.findings: list[Finding] = []
        self._quiet = quiet
        self._doing = "settings"
        self._spinner = contextlib.ExitStack()

    def doing(self, check: str, waiting: str = "") -> None:
        """What is checked from here on."""
        self._doing = check
        self.stop_waiting()
        if waiting and stderr.is_terminal:
            self._spinner.enter_context(stderr.status(escape(waiting)))

    def stop_waiting(self) -> None:
        """Take the spinner away, or it would stand in the middle of what is printed next."""
        self._spinner.close()

    def found(self, finding: Finding) -> None:
        """One more."""
        self.stop_waiting()
        self.findings.append(finding)
        if not self._quiet:
            _show(finding.check, finding.status, finding.detail)

    def failed(self, error: StreamprocError) -> None:
        """The last one; its sentence is for standard error."""
        self.stop_waiting()
        # Where it is the first there is nothing to tell it from.
        if self.findings and not self._quiet:
            _show(self._doing, "FAILED", "see below")
        self.findings.append(Finding(self._doing, "failed", str(error)))


def _show(check: str, status: str, detail: str) -> None:
    """One row; the columns are of fixed widths, since the rows to come are not known yet."""
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_column(min_width=_CHECK_WIDTH, overflow="fold")
    row.add_column(min_width=len("skipped"), no_wrap=True)
    row.add_column(overflow="fold")
    row.add_row(escape(check), status, escape(detail))
    show(row)
    sys.stdout.flush()


def _check(report: _Report, config: Path | None, records: Path | None, task: str | None) -> None:
    from streamproc.runtime.startup import declared_topics  # noqa: PLC0415 - --help needs none of it
    from streamproc.settings_loading import DEFAULT_PATH, load_with_places  # noqa: PLC0415 - as above

    loaded = load_with_places(config, os.environ)
    settings = loaded.settings
    tasks = ", ".join(settings.tasks)
    report.found(Finding("settings", "ok", f"{config or DEFAULT_PATH}: application {settings.name}, tasks {tasks}"))
    report.doing("topics")
    declared = declared_topics(settings)
    report.found(_topics_finding(settings, declared))
    _check_estimates(report, settings)
    report.doing("samples")
    samples = samples_of(settings, declared, records, task)
    _check_backend(report, loaded, samples)


def _check_estimates(report: _Report, settings: Settings) -> None:
    """Which estimate each task begins with, where there are some."""
    from streamproc.runtime.batch_plan import described, plan_of  # noqa: PLC0415 - --help needs none of it
    from streamproc.runtime.estimates import find_estimate  # noqa: PLC0415 - as above
    from streamproc.runtime.worker_process import worker_environment  # noqa: PLC0415 - as above

    for task in settings.tasks:
        report.doing(f"estimate {task}")
        found = find_estimate(settings, task, worker_environment(settings.pool, 0, os.environ))
        if found is None:
            continue
        plan = plan_of(settings, task, found)
        if plan.estimate is None:
            report.found(Finding(f"estimate {task}", "skipped", found.warning))
        else:
            said = "; ".join(filter(None, (described(plan), found.warning)))
            report.found(Finding(f"estimate {task}", "ok", said))


def _check_backend(report: _Report, loaded: Loaded, samples: dict[str, list[dict[str, Any]]]) -> None:
    path = loaded.settings.backend.path
    report.doing("backend", f"loading {path}")
    with contextlib.closing(_answers(loaded, samples)) as answers:
        # Those of the child come in the order of the samples.
        remaining = iter(samples)
        for answer in answers:
            if answer["event"] == "loaded":
                report.found(Finding("backend", "ok", f"{path}, loaded in {answer['seconds']:.2f} s"))
            elif answer["event"] == "task":
                report.found(_task_finding(answer))
                if (warning := _target_finding(loaded.settings.tasks[answer["task"]].batch, answer)) is not None:
                    report.found(warning)
            elif answer["event"] in ("failed", "settings"):
                _raise(answer, loaded)
            if answer["event"] in ("loaded", "task") and (name := next(remaining, None)) is not None:
                waiting = f"running {count_of(len(samples[name]), 'sample record')} of task {name}"
                report.doing(f"task {name}", waiting if samples[name] else "")


def _topics_finding(settings: Settings, declared: dict[str, DeclaredTopic]) -> Finding:
    if not declared:
        return Finding("topics", "skipped", f"none declared in {settings.topics_dir}")
    schemas = sum(it.schema_document is not None for it in declared.values())
    return Finding("topics", "ok", f"{len(declared)} declared in {settings.topics_dir}, {schemas} with a schema")


def _task_finding(answer: dict[str, Any]) -> Finding:
    name, records = f"task {answer['task']}", answer["records"]
    if not records:
        return Finding(name, "skipped", "no sample records: declare `samples` in the input topic's file, or --records")
    failed = f", {answer['failed']} of them failed by the backend itself" if answer["failed"] else ""
    per_record = answer["milliseconds"] / records
    keys = ", ".join(answer["keys"]) or "none"
    unmeasured = (
        f"; {answer['unmeasured']} without a length: {answer['unmeasured_for']}" if answer["unmeasured"] else ""
    )
    absent = f"; declared in output_keys, and in no output: {', '.join(answer['absent'])}" if answer["absent"] else ""
    return Finding(
        name,
        "ok",
        f"{count_of(records, 'sample record')} in, as many out{failed}; {per_record:.3f} ms a record; "
        f"fields: {keys}{absent}{unmeasured}",
    )


def _target_finding(batch: BatchSettings, answer: dict[str, Any]) -> Finding | None:
    """A warning where batches of samples took longer than the target leaves them."""
    if batch.target_latency_ms is None or not answer["records"]:
        return None
    left_ms = batch.target_latency_ms - batch.target_margin_ms
    took_ms = answer["milliseconds"] / math.ceil(answer["records"] / batch.max_size)
    if took_ms <= left_ms:
        return None
    size = min(answer["records"], batch.max_size)
    return Finding(
        f"task {answer['task']}",
        "warning",
        f"a batch of {count_of(size, 'sample record')} took {took_ms:.1f} ms, and batch.target_latency_ms "
        f"({batch.target_latency_ms:g}) less batch.target_margin_ms leaves {left_ms:g} ms: such records "
        "cannot keep it; raise it, or lower batch.max_size or batch.max_padded",
    )


def _answers(loaded: Loaded, samples: dict[str, list[dict[str, Any]]]) -> Generator[dict[str, Any]]:
    """The child's answers as they come; the last one says that it is done, or what failed.

    Raises:
        BackendError: loading, or a batch of samples, took longer than the pool allows, or the child crashed.
    """
    from streamproc.runtime.worker_process import worker_environment  # noqa: PLC0415 - --help needs none of it

    settings = loaded.settings
    limit_s, event = settings.pool.initialize_timeout_s, ""
    with _Child(_request(settings, samples), worker_environment(settings.pool, 0, os.environ)) as child:
        while event not in ("done", "failed", "settings"):
            try:
                line = child.read_line(limit_s)
            except TimeoutError:
                raise BackendError(_too_slow(settings, loading=not event)) from None
            if not line:
                doing = "ran sample records" if event else "was loaded"
                raise BackendError(f"the backend {settings.backend.path}: {child.how_it_ended()} while it {doing}")
            answer = orjson.loads(line)
            yield answer
            limit_s, event = settings.pool.batch_timeout_s, answer["event"]


def _request(settings: Settings, samples: dict[str, list[dict[str, Any]]]) -> bytes:
    from streamproc.runtime.startup import backend_setup, check_formats, check_tracing, length_setup  # noqa: PLC0415 - --help needs none of it

    check_formats(settings)
    check_tracing(settings)
    tasks = {
        name: {
            "records": records,
            "batch_size": settings.tasks[name].batch.max_size,
            "length": length_setup(settings.tasks[name]),
            "input_format": settings.tasks[name].input.format,
            "output_format": settings.tasks[name].output.format,
        }
        for name, records in samples.items()
    }
    debug = bool(os.environ.get("STREAMPROC_DEBUG"))
    return orjson.dumps({"backend": backend_setup(settings), "tasks": tasks, "debug": debug})


def _too_slow(settings: Settings, *, loading: bool) -> str:
    path, pool = settings.backend.path, settings.pool
    if loading:
        return (
            f"the backend {path} was not loaded within {pool.initialize_timeout_s:g} s, which is "
            f"pool.initialize_timeout_s; raise it, or see what initialize() waits for"
        )
    return (
        f"the backend {path} ran a batch of samples for more than {pool.batch_timeout_s:g} s, which is "
        f"pool.batch_timeout_s; raise it, or lower the task's batch.max_size"
    )


class _Child:
    """The process that runs the backend; it does not outlive the block."""

    def __init__(self, request: bytes, environ: Mapping[str, str]) -> None:
        # A file, and no pipe: the child may end before it has read all of it.
        with tempfile.TemporaryFile() as file:
            file.write(request)
            file.seek(0)
            command = [sys.executable, "-m", "streamproc.cli.backend_check"]
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                command, stdin=file, stdout=subprocess.PIPE, env=environ, bufsize=0
            )
        self._read = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.__exit__(None, None, None)

    def read_line(self, limit_s: float) -> bytes:
        """The next line, or nothing when there are no more. Raises TimeoutError."""
        output = self._process.stdout
        assert output is not None  # noqa: S101 - it was asked for
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._read:
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            if not (data := os.read(output.fileno(), 65_536)):
                return b""
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return line

    def how_it_ended(self) -> str:
        """The exit code, or the signal, in words."""
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"its process {how}"


def _raise(answer: dict[str, Any], loaded: Loaded) -> NoReturn:
    """The child's failure as an error of ours, with the place in the settings."""
    if answer["event"] == "settings":
        loc = ("backend", "config", *answer["loc"])
        known = next(loc[:end] for end in range(len(loc), 0, -1) if end == 1 or loaded.place_of(loc[:end]) != "default")
        raise SettingsError(
            answer["message"][:1].lower() + answer["message"][1:],
            setting=".".join(map(str, loc)),
            place=loaded.place_of(known),
            hint="the backend's own configuration model says so",
        )
    if answer["task"]:
        raise BackendError(f"task {answer['task']}: {answer['message']}")
    raise InferenceBackendLoadError(f"{loaded.place_of(('backend', 'path'))}: backend.path: {answer['message']}")
