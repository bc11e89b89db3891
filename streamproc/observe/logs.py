"""The processor's log: text for a person at a terminal, JSON lines for everything else.

Invariants:

- One event is one line of JSON, its traceback inside a field.
- Of what a caller adds to a record, only ``FIELDS`` and ``DETAILS`` are written: they say where something happened, and
  no payload is among them.
- Of a record's failure the log has what ``Failure.summary`` says, and the frames of its exception: never the
  exception's own words, which may quote the record. Those are in the dead letter.
- A message cannot steer the terminal or look like another line: control characters are written as escapes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO

import orjson

FIELDS = ("task", "topic", "partition", "offset", "worker", "batch", "trace_id")
"""What ``extra=`` may hold: where it was."""
DETAILS = (
    *("attempt", "records", "results", "failed", "closed_by", "offsets", "cause", "stage", "error_type"),
    *("wall_ms", "queue_ms", "decode_ms", "encode_ms", "steps_ms", "method", "path", "status", "elapsed_ms"),
)
"""What it may hold beside that: facts that the message says in words, in JSON alone."""

_batch: list[object] = []
"""Task, number and trace id of the batch that this process, a worker, executes now."""

# Each reports on its own what the processor's errors already say, at level info and below.
_QUIET = ("aiokafka", "uvicorn", "asyncio")
_COLOURS = {
    logging.DEBUG: "\x1b[2m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[31m",
}
_DIM, _RESET = "\x1b[2m", "\x1b[0m"
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
_ESCAPES[ord("\n")] = "\n    "


class _Handler(logging.StreamHandler[TextIO]):
    """The one handler of the processor's log, told from those of others by its type."""


def configure_logging(
    stream: TextIO,
    *,
    level: str,
    format: str,  # noqa: A002 - as the setting is called
    worker: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Write the log to ``stream``; ``level`` and ``format`` are those of the settings, which a worker does not import.

    A second call replaces the first; handlers of others stay.

    In a worker process, ``worker`` is its index, and becomes a field of every line. By ``clock``, which does not go
    back, repetitions are folded.
    """
    terminal = stream.isatty()
    handler = _Handler(stream)
    handler.addFilter(_Folded(clock))
    if worker is not None:
        handler.addFilter(_FromWorker(worker))
    if format == "json" or (format == "auto" and not terminal):
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter(colours=terminal and "NO_COLOR" not in os.environ, dates=not terminal))
    root = logging.getLogger()
    for old in [known for known in root.handlers if isinstance(known, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    least = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(least)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(least, logging.WARNING))


class _Folded(logging.Filter):
    """Lets one line of the Kafka client pass in ten seconds, as a warning, with the number of those held back.

    It repeats itself hundreds of times while a broker is away, and warns of every ordinary rebalance; what matters for
    good comes out of it as an exception.
    """

    EVERY_S = 10.0

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._quiet_until = -math.inf
        self._held_back = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("aiokafka") or logging.getLogger("aiokafka").level <= logging.DEBUG:
            return True
        if "is rebalancing" in record.getMessage():
            return False
        now = self._clock()  # not the record's own time, which jumps with the machine's
        if now < self._quiet_until:
            self._held_back += 1
            return False
        self._quiet_until = now + self.EVERY_S
        if self._held_back:
            record.msg, record.args = f"{record.getMessage()} ({self._held_back} more were held back)", ()
            self._held_back = 0
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        return True


class _FromWorker(logging.Filter):
    def __init__(self, worker: int) -> None:
        super().__init__()
        self._worker = worker

    def filter(self, record: logging.LogRecord) -> bool:
        record.__dict__ |= {"worker": self._worker, **dict(zip(("task", "batch", "trace_id"), _batch, strict=False))}
        return True


def executing(*batch: object) -> None:
    """From now on every line of this worker, its backend's too, has its batch's task, number and trace id; or none."""
    _batch[:] = batch


def frames_of(error: BaseException) -> str:
    """Where an exception was raised, and of which type it is, for ``extra=``; not what it says.

    Raises whatever an exception of the user's, or the code that raised it, makes of being looked at.
    """
    return "".join([*traceback.format_list(traceback.extract_tb(error.__traceback__)), type(error).__qualname__])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``ts`` (UTC), ``level``, ``logger``, ``message``, the fields, ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        ts = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry: dict[str, object] = {
            "ts": ts,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record, FIELDS + DETAILS),
        }
        if exception := _exception(self, record):
            entry["exception"] = exception
        try:
            return orjson.dumps(entry, default=str).decode()
        except TypeError:
            # Half a surrogate pair in a message, or an integer beyond 64 bits: the slower encoder takes both.
            return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """``12:00:01 warning  message  task=text partition=0``, and below it a traceback where there is one."""

    def __init__(self, *, colours: bool, dates: bool) -> None:
        super().__init__()
        self._colours = colours
        self._clock = "%Y-%m-%d %H:%M:%S" if dates else "%H:%M:%S"

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        clock = time.strftime(self._clock, time.localtime(record.created))
        message = record.getMessage()
        if not record.name.startswith("streamproc"):
            message = f"{record.name}: {message}"
        level = self._coloured(f"{record.levelname.lower():<8}", _COLOURS.get(record.levelno, ""))
        told = _fields(record, FIELDS).items()
        fields = " ".join(f"{name}={value}" for name, value in told if f"{name} {value}" not in message)
        line = f"{self._coloured(clock, _DIM)} {level} {message.translate(_ESCAPES)}"
        if fields:
            line += f"  {self._coloured(fields.translate(_ESCAPES), _DIM)}"
        if exception := _exception(self, record):
            line += f"\n{exception}".translate(_ESCAPES)
        return line

    def _coloured(self, text: str, colour: str) -> str:
        return f"{colour}{text}{_RESET}" if self._colours and colour else text


def _fields(record: logging.LogRecord, names: tuple[str, ...]) -> dict[str, object]:
    return {name: value for name in names if (value := getattr(record, name, None)) is not None}


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if record.exc_info:
        return formatter.formatException(record.exc_info)
    return getattr(record, "frames", "")
