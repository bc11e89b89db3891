"""Which sample records a command runs: those of the declared topics, or those of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from streamproc.cli.terminal import UsageError
from streamproc.errors import StreamprocError

if TYPE_CHECKING:
    from streamproc.broker.declared_topics import DeclaredTopic
    from streamproc.settings import Settings


class SampleError(StreamprocError):
    """A sample record cannot be used."""


def samples_of(
    settings: Settings, declared: dict[str, DeclaredTopic], records: Path | None, task: str | None
) -> dict[str, list[dict[str, Any]]]:
    """Per task, the records to run: the declared ones, which match their schemas, or those of a file.

    Raises:
        SampleError: the file holds what is no record, or what a schema of the task's input topics refuses.
        UsageError: there is no such file or task.
    """
    if records is not None:
        if task is None and len(settings.tasks) > 1:
            raise UsageError(f"--records needs --task: one of {', '.join(settings.tasks)}")
        name = task or next(iter(settings.tasks))
        if name not in settings.tasks:
            raise UsageError(f"there is no task {name}; the tasks are {', '.join(settings.tasks)}")
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
        raise UsageError(f"there is no task {task}; the tasks are {', '.join(settings.tasks)}")
    return samples


def _read_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); name a file of JSON lines") from error
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
