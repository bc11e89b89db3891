"""A backend alone, in the test's own process: records in, what a worker would deliver out.

Records and outputs go through JSON, so that what a test sees is what a consumer of the results sees.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from streamproc.backend.record_error import RecordError
from streamproc.backend.tasks import is_backend, resolve_task
from streamproc.loaders import load_backend
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
        records: The records, in batches of ``batch_size``, or all in one.
        task: Which one, where the backend has several.
        batch_size: Records in a batch.
        config: Keyword arguments of the backend's configuration; those of settings are under them.

    Raises:
        BackendError: the backend cannot be loaded, or answers with what a worker would not deliver.
        Exception: whatever the backend raises.
    """
    runner: Any = resolve_task(_made(backend, config or {}), task)
    inputs = [orjson.loads(orjson.dumps(record)) for record in records]
    outputs: list[dict[str, Any] | RecordError] = []
    size = batch_size or max(1, len(inputs))
    for first in range(0, len(inputs), size):
        batch = inputs[first : first + size]
        answered = delivered(runner(batch), first, len(batch))
        outputs += [orjson.loads(it) if isinstance(it, bytes) else it for it in answered]
    return outputs


def _made(backend: Any, config: dict[str, Any]) -> Any:
    if isinstance(backend, Settings):
        it = backend.backend
        return load_backend(it.path, loader=it.loader, base_dir=it.base_dir, config={**it.config, **config})
    if isinstance(backend, str):
        return load_backend(backend, loader="local", base_dir=Path.cwd(), config=config)
    return backend if is_backend(backend) else backend(**config)
