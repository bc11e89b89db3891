"""Loads a backend and runs sample records through it, in a process of its own: the child of ``streamproc check``.

Apart, so that the backend gets its environment before any import, as in a worker; so that what it prints does not mix
with the command's output; and so that a crash in native code is a sentence and not the end of the command.

Outputs are judged as the worker judges them, so that what passes here is what ``streamproc run`` delivers.

The request comes as JSON on standard input, the answers go as JSON lines to what was standard output at the start: one
when the backend is loaded, one for each batch, one for each task, so that the parent can time each of them.
"""

from __future__ import annotations

import linecache
import os
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
import yaml
from pydantic import ValidationError

from streamproc.errors import BackendError, StreamprocError
from streamproc.runtime.output_check import ONE_DICT_PER_RECORD
from streamproc.runtime.parent_death import die_with_parent

_PACKAGE = Path(__file__).resolve().parents[1]
_SOURCE_CHARS = 120


def main() -> None:
    """The child's entry."""
    die_with_parent()  # a backend that hangs must not be left behind, whatever ended the command
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
            length = _length(request["backend"], task, samples)
            answer(event="task", task=task, **length, **_run(backend, task, samples, lambda: answer(event="batch")))
    except ValidationError as error:
        # Of the backend's own configuration model. Its messages repeat no input.
        first = error.errors(include_url=False, include_input=False)[0]
        answer(event="settings", loc=list(first["loc"]), message=first["msg"])
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the user's code raises is told to the parent
        if request["debug"]:
            traceback.print_exception(error)
        answer(event="failed", task=task, message=_described(error) + _place(error, request["backend"]))
    else:
        answer(event="done")


def _load(backend: dict[str, Any]) -> Any:
    from streamproc.loaders import load_backend  # noqa: PLC0415 - inside the try, as the user's code is

    return load_backend(**{**backend, "config": yaml.safe_load(backend["config"])})


def _length(backend: dict[str, Any], task: str, samples: dict[str, Any]) -> dict[str, Any]:
    """How many samples have no length where they should, and why, as the measuring process would find."""
    length = samples["length"]
    if length is None:
        return {"unmeasured": 0}
    from streamproc.formats.values import samples_in  # noqa: PLC0415 - as above
    from streamproc.loaders import load_backend  # noqa: PLC0415 - inside the try, as the user's code is
    from streamproc.runtime.lengths import meter_for  # noqa: PLC0415 - as above

    # Another one, that is not initialized: what length() needs must not come from initialize().
    loaded = None
    if length["of"] == "backend":
        loaded = load_backend(**{**backend, "config": yaml.safe_load(backend["config"])}, initialize=False)
    records = samples_in(samples["input_format"], samples["records"])
    # They are decoded: how a format does that, and where its schemas are, plays no part.
    meter = meter_for({**length, "input_format": "json"}, loaded, task)
    _, failures = meter.measure_records(records, len(records))
    if failures and len(failures) == len(records):
        raise BackendError(f"none of the {len(records)} sample records has a length: {failures[0][1]}")
    return {"unmeasured": len(failures), "unmeasured_for": failures[0][1] if failures else None}


def _run(backend: Any, task: str, samples: dict[str, Any], on_batch: Callable[[], None]) -> dict[str, Any]:
    """Run the samples in batches of the task's size; what came out."""
    from streamproc.backend.tasks import resolve_task  # noqa: PLC0415 - as above
    from streamproc.formats.values import samples_in  # noqa: PLC0415 - as above
    from streamproc.runtime.encoders import encode_without_schema  # noqa: PLC0415 - as above
    from streamproc.runtime.output_check import delivered  # noqa: PLC0415 - as above

    runner: Any = resolve_task(backend, task)
    records = samples_in(samples["input_format"], samples["records"])
    encode, batch_size = encode_without_schema(samples["output_format"]), samples["batch_size"]
    keys: dict[str, None] = {}
    failed, milliseconds = 0, 0.0
    for first in range(0, len(records), batch_size):
        batch = records[first : first + batch_size]
        answered = runner(batch)
        outputs = delivered(answered, first, len(batch), encode)
        milliseconds += runner.get_metrics().total_execution_time
        for given, output in zip(answered, outputs, strict=True):
            if isinstance(output, bytes):
                keys |= dict.fromkeys(map(str, given))
            else:
                failed += 1
        on_batch()
    declared = getattr(getattr(runner, "config", None), "output_keys", None) or ()
    absent = sorted(set(declared) - set(keys)) if failed < len(records) else []
    return {
        "records": len(records),
        "failed": failed,
        "milliseconds": milliseconds,
        "keys": list(keys),
        "absent": absent,
    }


def _described(error: BaseException) -> str:
    """What an exception says; its type first, unless the sentence is ours and names it."""
    text = str(error) or type(error).__name__
    if (
        isinstance(error, BackendError)
        and error.__cause__ is None
        and text.startswith("the outputs must be a list, but")
    ):
        return f"{text}; {ONE_DICT_PER_RECORD}"
    named = text.startswith(type(error).__name__)
    return text if named or _is_ours(error) else f"{type(error).__name__}: {text}"


def _is_ours(error: BaseException) -> bool:
    return isinstance(error, StreamprocError) or type(error).__module__ == "packflow.exceptions"


def _place(error: BaseException, backend: dict[str, Any]) -> str:
    """Where in the user's code an exception comes from, with the line itself; nothing where it is not from there."""
    while _is_ours(error) and error.__cause__ is not None:
        error = error.__cause__
    base_dir = Path(backend["base_dir"]).resolve()
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return _shown(Path(error.filename), error.lineno, base_dir)
    frames = list(_foreign(error))
    module = backend["path"].partition(":")[0].partition(".")[0]
    own = [
        (frame, line)
        for frame, line in frames
        if _is_below(_file(frame), base_dir) or str(frame.f_globals.get("__name__")).partition(".")[0] == module
    ]
    innermost = (own or frames)[-1:]
    return "".join(_shown(_file(frame), line, base_dir) for frame, line in innermost)


def _foreign(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames of an exception that are neither ours nor packflow's nor Python's own, outermost first."""
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    for frame, line in traceback.walk_tb(error.__traceback__):
        file, module = _file(frame), str(frame.f_globals.get("__name__"))
        of_python = frame.f_code.co_filename.startswith("<") or _is_below(file, stdlib)
        if not (of_python or file.is_relative_to(_PACKAGE) or module.partition(".")[0] == "packflow"):
            yield frame, line


def _file(frame: FrameType) -> Path:
    return Path(frame.f_code.co_filename).resolve()


def _is_below(file: Path, directory: Path) -> bool:
    """Whether a file is in a directory, but not among the packages that are installed there."""
    return file.is_relative_to(directory) and "site-packages" not in file.relative_to(directory).parts


def _shown(file: Path, line: int, base_dir: Path) -> str:
    name = file.resolve().relative_to(base_dir) if _is_below(file.resolve(), base_dir) else file
    source = linecache.getline(str(file), line).strip()
    if len(source) > _SOURCE_CHARS:
        source = source[: _SOURCE_CHARS - 1] + "…"
    return f" at {name}:{line}" + (f": {source}" if source else "")


if __name__ == "__main__":
    main()
