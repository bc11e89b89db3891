"""A backend alone, in the test's own process: records in, what a worker would deliver out.

Records and outputs go through the task's formats where settings say which, and through JSON otherwise, so that what a
test sees is what a consumer of the results sees. No schema registry is asked: for its formats records hold what they
would decode to, and outputs what JSON makes of them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from streamproc.backend.record_error import RecordError
from streamproc.backend.tasks import is_backend, resolve_task
from streamproc.formats.values import samples_in
from streamproc.loaders import load_backend
from streamproc.runtime.decoders import decode_one_for
from streamproc.runtime.encoders import encode_without_schema
from streamproc.runtime.output_check import delivered
from streamproc.settings import Settings


def run_backend(
    backend: Any,
    records: Iterable[dict[str, Any]],
    *,
    task: str = "main",
    batch_size: int | None = None,
    config: dict[str, Any] | None = None,
) -> list[dict[str, Any] | RecordError]:
    """Run records through a backend, and return an output for each: a dict, or the ``RecordError`` in its place.

    Args:
        backend: An instance; a class; a path such as ``inference:Backend``, from the current folder; or settings.
        records: The records, in batches of ``batch_size``, or all in one; with bytes where a task's format has them.
        task: Which one, where the backend has several.
        batch_size: Records in a batch.
        config: Keyword arguments of the backend's configuration; those of settings are under them.

    Raises:
        BackendError: the backend cannot be loaded, or answers with what a worker would not deliver.
        Exception: whatever the backend raises.
    """
    runner: Any = resolve_task(_made(backend, config or {}), task)
    input_format, output_format = _formats(backend, task)
    decoded = [orjson.loads(orjson.dumps(it, default=None if input_format == "json" else _bytes)) for it in records]
    inputs = samples_in(input_format, decoded)
    encode = encode_without_schema(output_format)
    read = decode_one_for(output_format if output_format in ("raw", "msgpack") else "json")
    outputs: list[dict[str, Any] | RecordError] = []
    size = batch_size or max(1, len(inputs))
    for first in range(0, len(inputs), size):
        batch = inputs[first : first + size]
        answered = delivered(runner(batch), first, len(batch), encode)
        outputs += [read(memoryview(it)) if isinstance(it, bytes) else it for it in answered]
    return outputs


def _formats(backend: Any, task: str) -> tuple[str, str]:
    """The formats of a task's input and output; a plain backend serves a task of any name."""
    tasks = backend.tasks if isinstance(backend, Settings) else {}
    it = tasks.get(task) or (next(iter(tasks.values())) if len(tasks) == 1 else None)
    return ("json", "json") if it is None else (it.input.format, it.output.format)


def _bytes(value: Any) -> dict[str, str]:
    if isinstance(value, bytes | bytearray | memoryview):
        return {"$base64": base64.b64encode(value).decode()}
    raise TypeError(f"a record holds what JSON could hold, and bytes, not {type(value).__name__}")


def _made(backend: Any, config: dict[str, Any]) -> Any:
    if isinstance(backend, Settings):
        it = backend.backend
        return load_backend(it.path, loader=it.loader, base_dir=it.base_dir, config={**it.config, **config})
    if isinstance(backend, str):
        return load_backend(backend, loader="local", base_dir=Path.cwd(), config=config)
    return backend if is_backend(backend) else backend(**config)
