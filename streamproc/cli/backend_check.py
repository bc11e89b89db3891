"""Loads a backend and runs sample records through it, in a process of its own: the child of ``streamproc check``.

Apart, so that the backend gets its environment before any import, as in a worker; so that what it prints does not mix
with the command's output; and so that a crash in native code is a sentence and not the end of the command.

The request comes as JSON on standard input, the answers go as JSON lines to what was standard output at the start.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from typing import Any

import orjson
import yaml
from pydantic import ValidationError


def main() -> None:
    """The child's entry."""
    # Ctrl-C reaches the whole terminal group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # From here on whatever is printed, by native code too, goes to standard error.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        answers.write(orjson.dumps(fields, default=str) + b"\n")

    request = orjson.loads(sys.stdin.buffer.read())
    task: str | None = None
    try:
        begun = time.perf_counter()
        backend = _load(request["backend"])
        answer(event="loaded", seconds=time.perf_counter() - begun)
        for task, samples in request["tasks"].items():
            answer(event="task", task=task, **_run(backend, task, samples["records"], samples["batch_size"]))
    except ValidationError as error:
        # Of the backend's own configuration model. Its messages repeat no input.
        first = error.errors(include_url=False, include_input=False)[0]
        answer(event="settings", loc=list(first["loc"]), message=first["msg"])
    except Exception as error:  # noqa: BLE001 - whatever the user's code raises is told to the parent
        if request["debug"]:
            traceback.print_exception(error)
        answer(event="failed", task=task, kind=type(error).__name__, message=str(error))
    else:
        answer(event="done")


def _load(backend: dict[str, Any]) -> Any:
    from streamproc.loaders import load_backend  # noqa: PLC0415 - inside the try, as the user's code is

    return load_backend(**{**backend, "config": yaml.safe_load(backend["config"])})


def _run(backend: Any, task: str, records: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    """Run the samples in batches of the task's size; what came out."""
    from streamproc.backend.record_error import RecordError  # noqa: PLC0415 - as above
    from streamproc.backend.tasks import resolve_task  # noqa: PLC0415 - as above

    runner: Any = resolve_task(backend, task)
    # packflow 0.3 knows the older name only.
    check_io = getattr(runner, "check_io", None) or runner.validate
    keys: dict[str, None] = {}
    failed, milliseconds = 0, 0.0
    for first in range(0, len(records), batch_size):
        outputs = check_io(records[first : first + batch_size])
        milliseconds += runner.get_metrics().total_execution_time
        for output in outputs:
            if isinstance(output, RecordError):
                failed += 1
            else:
                keys |= dict.fromkeys(output)
    return {"records": len(records), "failed": failed, "milliseconds": milliseconds, "keys": list(keys)}


if __name__ == "__main__":
    main()
