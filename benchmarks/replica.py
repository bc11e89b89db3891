"""A ``streamproc run`` as a user starts it: a process of its own, its settings in a file, its log as JSON lines.

What the benchmarks of start-up, latency and growth share. The process ends with the block that it was started for, in
order where the block did, so that a benchmark also notices a replica that does not end well.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from deploy.kafka.kafka import HOST, free_ports

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
_ROOT = Path(__file__).resolve().parents[1]


def settings_of(
    name: str,
    bootstrap: str,
    tasks: dict[str, Any],
    *,
    backend: str = "identity:Backend",
    workers: int = 1,
    pool: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings of an application with a backend of this folder; its groups are named after it."""
    return {
        "name": name,
        "kafka": {"bootstrap_servers": bootstrap},
        "backend": {"path": backend, "base_dir": str(Path(__file__).parent)},
        "pool": {"workers": workers, **(pool or {})},
        "tasks": tasks,
        "logging": {"format": "json"},
    }


class Replica:
    """One replica. Use it as a context manager: the process runs within the block.

    Args:
        settings: As ``streamproc.yaml`` has them, without a port.
        directory: Where its settings and its log go.
        name: Of those files, when several share the directory.
    """

    def __init__(self, settings: dict[str, Any], directory: Path, name: str = "replica") -> None:
        (self.port,) = free_ports(1)
        self._file = directory / f"{name}.yaml"
        self._log = directory / f"{name}.log"
        http = {**settings.get("http", {}), "port": self.port}
        self._file.write_text(yaml.safe_dump({**settings, "http": http}), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        """When it was started, in seconds since 1970."""

    def __enter__(self) -> Self:
        """Start the process; it is not ready yet."""
        command = [sys.executable, "-m", "streamproc", "run", "-c", str(self._file)]
        with self._log.open("wb") as log:
            self.started_at = time.time()
            self._process = subprocess.Popen(command, stderr=log, cwd=_ROOT)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Have it drain and end; an end that is not in order is an error, unless there is one already."""
        process = self._running
        process.terminate()
        try:
            code = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code and kind is None:
            raise SystemExit(f"streamproc ended with {code}:\n{self.log_tail()}")

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the replica was not started"
        return self._process

    @property
    def process(self) -> psutil.Process:
        """The parent's process."""
        return psutil.Process(self._running.pid)

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of what the sidecar answers on a connection of its own; 0 while nobody listens."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5.0)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        except ConnectionRefusedError:
            return 0, b""
        finally:
            connection.close()

    def until_ready(self, every_s: float = 0.003) -> float:
        """Ask ``/readyz`` until it answers 200; the seconds since the start of the process."""
        deadline = self.started_at + START_TIMEOUT_S
        while self.get("/readyz")[0] != 200:
            self.check()
            if time.time() > deadline:
                raise SystemExit(f"streamproc is not ready within {START_TIMEOUT_S:g} s:\n{self.log_tail()}")
            time.sleep(every_s)
        return time.time() - self.started_at

    def check(self) -> None:
        """Raise where the process has ended."""
        if self._running.poll() is not None:
            raise SystemExit(f"streamproc ended with {self._running.returncode}:\n{self.log_tail()}")

    def log(self) -> list[tuple[float, str]]:
        """Its log: seconds since its start, and the message."""
        written = self._log.read_text(encoding="utf-8").splitlines()
        lines = [json.loads(line) for line in written if line.startswith("{") and line.endswith("}")]
        return [(datetime.fromisoformat(it["ts"]).timestamp() - self.started_at, it["message"]) for it in lines]

    def log_tail(self, lines: int = 20) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
