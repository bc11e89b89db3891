"""What every child process of the processor begins and ends with: its bond to the parent, its signals, its socket.

A child is a fresh interpreter that the parent started with one end of a socket. It ends with the parent, however that
ends; Ctrl-C and SIGTERM it leaves to the parent; and where memory runs out it goes before the parent, which Kafka's
clients live in.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from streamproc.errors import (
    InferenceBackendLoadError,
    PreprocessorInitError,
    StreamprocError,
    name_of_type,
    text_of,
)
from streamproc.runtime.codec import shorten
from streamproc.runtime.heap import keep_freed_memory
from streamproc.runtime.parent_death import die_with_parent
from streamproc.runtime.wire import Segment, WireError

OOM_SCORE_ABOVE_PARENT = 500

log = logging.getLogger("streamproc.child")


def start_failure(error: Exception) -> dict[str, Any]:
    """The sentence, and whether another try would end the same way: code and settings do not mend themselves."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(["backend.config", *map(str, first["loc"])])
        message = f"{where}: {first['msg']}; the backend's own configuration model says so"
        return {"message": shorten(message), "final": True}
    text = text_of(error)
    message = text if isinstance(error, StreamprocError) else f"{name_of_type(error)}: {text}"
    return {"message": shorten(message), "final": isinstance(error, InferenceBackendLoadError | PreprocessorInitError)}


def _go_before_the_parent() -> None:
    """Have Linux take this process first when memory runs out; whoever takes the parent stops the whole replica."""
    score = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError):
        score.write_text(str(min(int(score.read_text()) + OOM_SCORE_ABOVE_PARENT, 1_000)))


def _leave_it_to_the_parent(number: int, frame: object) -> None:
    """Not SIG_IGN, which processes that the backend starts would inherit."""


def _let_children_be_terminated() -> None:
    """Give what the backend forks the default SIGTERM back; blocked meanwhile, since the first may come at once."""
    mask = [signal.SIGTERM]

    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, mask)

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, mask),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, mask),
        after_in_child=in_child,
    )


def child_main(serve: Callable[[socket.socket, Sequence[Segment]], int]) -> None:
    """Be such a process: the descriptors of its socket and of its segments, and the parent's id, are its arguments.

    ``serve`` runs until the parent wants no more, and answers the exit code.
    """
    die_with_parent()
    _go_before_the_parent()
    keep_freed_memory()
    # Ctrl-C reaches the whole terminal group; only the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A service manager may send SIGTERM to every process of the service; the parent drains, and ends its children.
    signal.signal(signal.SIGTERM, _leave_it_to_the_parent)
    _let_children_be_terminated()
    socket_fd, parent, *segment_fds = (int(argument) for argument in sys.argv[1:])
    if os.getppid() != parent:
        return
    segments = [Segment(fd) for fd in segment_fds]
    with socket.socket(fileno=socket_fd) as connection:
        try:
            code = serve(connection, segments)
        except (BrokenPipeError, ConnectionResetError):
            code = 0
        except WireError as error:
            log.critical("cannot understand the parent: %s", error)  # the user's code read from the socket
            code = 1
    sys.exit(code)
