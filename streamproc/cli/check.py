"""``streamproc check``: everything that can be known without Kafka, before a processor is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import orjson
import typer

from streamproc.cli.terminal import ConfigOption, JsonOption, print_json, stdout, table
from streamproc.errors import BackendError, InferenceBackendLoadError, SettingsError, StreamprocError

if TYPE_CHECKING:
    from streamproc.broker.declared_topics import DeclaredTopic
    from streamproc.settings import Settings
    from streamproc.settings_loading import Loaded

app = typer.Typer()

_SLACK_S = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked: ``ok``, ``failed``, or ``skipped`` for want of something to check with."""

    check: str
    status: str
    detail: str


class SampleError(StreamprocError):
    """A sample record cannot be used."""


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
    task: Annotated[str | None, typer.Option(help="The task that --records are for, where there are several.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check settings, declared topics and their schemas, then load the backend and run sample records through it.

    Touches no Kafka. The backend runs in a process of its own, with the environment that its workers will have.
    """
    findings: list[Finding] = []
    failure: StreamprocError | None = None
    try:
        findings.extend(_findings(config, records, task))
    except _CheckFailedError as error:
        findings.extend(error.so_far)
        findings.append(Finding(error.check, "failed", str(error.cause)))
        failure = error.cause
    if as_json:
        print_json({"ok": failure is None, "checks": [asdict(finding) for finding in findings]})
    elif failure is None or len(findings) > 1:
        marks = {"ok": "ok", "failed": "FAILED", "skipped": "skipped"}
        # The sentence itself is for standard error.
        rows = [(it.check, marks[it.status], "see below" if it.status == "failed" else it.detail) for it in findings]
        stdout.print(table(("check", "", ""), rows))
    if failure is not None:
        raise failure


class _CheckFailedError(Exception):
    """Carries what was found so far past the one that failed."""

    def __init__(self, check: str, so_far: list[Finding], cause: StreamprocError) -> None:
        self.check = check
        self.so_far = so_far
        self.cause = cause
        super().__init__(check)


def _findings(config: Path | None, records: Path | None, task: str | None) -> list[Finding]:
    from streamproc.runtime.startup import declared_topics  # noqa: PLC0415 - --help needs none of it
    from streamproc.settings_loading import DEFAULT_PATH, load_with_places  # noqa: PLC0415 - as above

    found: list[Finding] = []
    doing = "settings"
    try:
        loaded = load_with_places(config, os.environ)
        settings = loaded.settings
        tasks = ", ".join(settings.tasks)
        found.append(Finding(doing, "ok", f"{config or DEFAULT_PATH}: application {settings.name}, tasks {tasks}"))
        doing = "topics"
        declared = declared_topics(settings)
        found.append(_topics_finding(settings, declared))
        doing = "samples"
        samples = _samples(settings, declared, records, task)
        doing = "backend"
        for answer in _run_backend(loaded, samples):
            if answer["event"] == "loaded":
                found.append(Finding(doing, "ok", f"{settings.backend.path}, loaded in {answer['seconds']:.2f} s"))
                doing = "backend on samples"
            elif answer["event"] == "task":
                found.append(_task_finding(answer))
            elif answer["event"] != "done":
                doing = f"task {answer['task']}" if answer.get("task") else doing
                _raise(answer, loaded)
    except StreamprocError as error:
        raise _CheckFailedError(doing, found, error) from error
    return found


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
    return Finding(
        name, "ok", f"{records} sample records in, as many out{failed}; {per_record:.3f} ms a record; fields: {keys}"
    )


def _samples(
    settings: Settings, declared: dict[str, DeclaredTopic], records: Path | None, task: str | None
) -> dict[str, list[dict[str, Any]]]:
    """Per task, the records to run: the declared ones, which match their schemas, or those of a file.

    Raises:
        SampleError: the file holds what is no record, or what a schema of the task's input topics refuses.
    """
    if records is not None:
        if task is None and len(settings.tasks) > 1:
            raise SampleError(f"--records needs --task: one of {', '.join(settings.tasks)}")
        name = task or next(iter(settings.tasks))
        if name not in settings.tasks:
            raise SampleError(f"there is no task {name}; the tasks are {', '.join(settings.tasks)}")
        given = list(_read_records(records))
        for topic in settings.tasks[name].input.topics:
            if topic in declared:
                _check_schema(declared[topic], [(f"{records}:{line}", record) for line, record in given])
        return {name: [record for _, record in given]}
    samples: dict[str, list[dict[str, Any]]] = {}
    for name, it in settings.tasks.items():
        if task in (None, name):
            samples[name] = [
                sample for topic in it.input.topics if topic in declared for sample in declared[topic].samples
            ]
    if not samples:
        raise SampleError(f"there is no task {task}; the tasks are {', '.join(settings.tasks)}")
    return samples


def _read_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise SampleError(f"{file}: cannot be read ({error.strerror}); name a file of JSON lines") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise SampleError(f"{file}:{number}: not JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(record, dict):
                raise SampleError(f"{file}:{number}: not a JSON object; a record is an object on a line of its own")
            yield number, record


def _check_schema(topic: DeclaredTopic, records: list[tuple[str, dict[str, Any]]]) -> None:
    if topic.schema_document is None:
        return
    from streamproc.runtime.codec import Schema  # noqa: PLC0415 - imports numpy

    schema = Schema(topic.name, topic.schema_document)
    for place, record in records:
        if (failure := schema.check(record)) is not None:
            raise SampleError(f"{place}: {failure.message}; mend the record or the schema")


def _run_backend(loaded: Loaded, samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The child's answers. Raises BackendError when it ends without its last one."""
    from streamproc.runtime.pool import worker_environment  # noqa: PLC0415 - --help needs none of it
    from streamproc.runtime.startup import backend_setup  # noqa: PLC0415 - as above

    settings = loaded.settings
    backend, pool = settings.backend, settings.pool
    request = {
        "backend": backend_setup(settings),
        "tasks": {
            name: {"records": records, "batch_size": settings.tasks[name].batch.max_size}
            for name, records in samples.items()
        },
        "debug": bool(os.environ.get("STREAMPROC_DEBUG")),
    }
    batches = sum(-(-len(records) // settings.tasks[name].batch.max_size) for name, records in samples.items())
    limit_s = pool.initialize_timeout_s + batches * pool.batch_timeout_s + _SLACK_S
    with subprocess.Popen(
        [sys.executable, "-m", "streamproc.cli.backend_check"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=worker_environment(pool, 0, os.environ),
    ) as child:
        try:
            output, _ = child.communicate(orjson.dumps(request), timeout=limit_s)
        except subprocess.TimeoutExpired as error:
            raise BackendError(
                f"the backend {backend.path} took longer than {limit_s:g} s for its start and {batches} batches of "
                f"samples (pool.initialize_timeout_s, pool.batch_timeout_s)"
            ) from error
        finally:
            child.kill()
    answers = [orjson.loads(line) for line in output.splitlines()]
    if not answers or answers[-1]["event"] not in ("done", "failed", "settings"):
        code = child.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        doing = "ran sample records" if answers else "was loaded"
        answers.append(
            {"event": "failed", "kind": "", "message": f"its process {how} while the backend {doing}", "task": None}
        )
    return answers


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
    kind = answer["kind"]
    message = answer["message"] if kind.startswith("InferenceBackend") or not kind else f"{kind}: {answer['message']}"
    raise InferenceBackendLoadError(f"{loaded.place_of(('backend', 'path'))}: backend.path: {message}")
