"""The measuring process: decodes values, beside the workers, and answers what each record is padded by.

The parent decodes nothing, so it asks here. Started by ``measuring`` as a worker is by the pool, over the same kind of
socket. For a length that is the backend's the backend is made, but ``initialize()`` is not called: no weights are
loaded twice. What ``length`` needs, a tokenizer say, it loads at its first call.

Order: chunks are answered in the order in which they came. Nothing is retried here. A record without a length fails by
itself.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from typing import Any

import yaml

from streamproc.loaders import load_backend
from streamproc.observe.logs import configure_logging, frames_of
from streamproc.runtime.child import child_main, start_failure
from streamproc.runtime.decoders import registry_of
from streamproc.runtime.lengths import LengthError, Meter, meter_for
from streamproc.runtime.wire import Frame, Kind, decode_values, read_frame, write_frame

MAX_BODY_BYTES = 2**40
"""The parent is trusted; it may have read a record of any size."""
MAX_TRACEBACKS = 20

log = logging.getLogger("streamproc.measurer")


class Measurer:
    """The process's loop over frames."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._meters: dict[str, Meter] = {}
        self._logged: set[tuple[str, str]] = set()

    def serve(self) -> int:
        """Run until the parent says stop; the process's exit code."""
        setup = read_frame(self._connection, 0)
        if setup is None or setup.kind is not Kind.SETUP:
            return 0
        configure_logging(sys.stderr, **setup.head["logging"])
        begun = time.perf_counter()
        try:
            self._set_up(setup.head)
        except Exception as error:
            log.debug("the measuring process did not start", exc_info=error)
            write_frame(self._connection, Kind.START_FAILED, start_failure(error))
            return 1
        write_frame(self._connection, Kind.READY, {"initialize_s": time.perf_counter() - begun})
        while (frame := read_frame(self._connection, MAX_BODY_BYTES)) is not None and frame.kind is not Kind.STOP:
            self._answer(frame)
        return 0

    def _set_up(self, head: dict[str, Any]) -> None:
        backend: Any = None
        if (setup := head["backend"]) is not None:
            backend = load_backend(**{**setup, "config": yaml.safe_load(setup["config"])}, initialize=False)
        registry = registry_of(head["registry"])
        self._meters = {name: meter_for(task, backend, name, registry) for name, task in head["tasks"].items()}

    def _answer(self, frame: Frame) -> None:
        task = frame.head["task"]
        lengths, failures = self._meters[task].measure(decode_values(frame.body, frame.head["count"]))
        for kind, _, error in failures:
            self._log_once(task, kind, error)
        head = {"id": frame.head["id"], "failures": [(kind, message) for kind, message, _ in failures]}
        write_frame(self._connection, Kind.LENGTHS, head, [lengths.tobytes()], 8 * len(lengths))

    def _log_once(self, task: str, kind: str, error: BaseException) -> None:
        """The traceback of each kind of exception, the first time; the parent logs dead letters from time to time."""
        if isinstance(error, LengthError) or (task, kind) in self._logged or len(self._logged) >= MAX_TRACEBACKS:
            return
        self._logged.add((task, kind))
        try:
            frames = frames_of(error)
        except BaseException:  # noqa: BLE001 - an exception of the user's, or its code, may be unfit for that
            frames = ""
        details = {"task": task, "stage": "length", "error_type": kind, "frames": frames}
        log.warning("task %s: the first of these: length failed with %s", task, kind, extra=details)


def main() -> None:
    """The entry of the process: the descriptor of its socket is its argument."""
    child_main(lambda connection, _: Measurer(connection).serve())
