"""One replica: ``streamproc run`` in a process of its own, what is done to it, and what is seen of it.

A replica that ends without having been told to is an *unexpected exit*. What is seen comes from its ``/status``, asked
twice a second at its own port, which no cut reaches: what it has read and not committed of each partition.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import yaml

from tests.chaos.oracle import Sample

ROOT = Path(__file__).parents[2]
POLL_S = 0.5
STOP_WITHIN_S = 60.0
TAIL_LINES = 25


class Replica:
    """A place for a replica: its process comes and goes, its settings, port and log stay."""

    def __init__(
        self, index: int, directory: Path, port: int, settings: dict[str, Any], committed: Callable[[str, int], int]
    ) -> None:
        """``committed`` answers the offset of a task's partition that the group has committed, as far as is known."""
        self.index = index
        self._file = directory / f"replica-{index}.yaml"
        self.log_file = directory / f"replica-{index}.log"
        self._file.write_text(yaml.safe_dump({**settings, "http": {"port": port}}))
        self.url = f"http://127.0.0.1:{port}"
        self._committed = committed
        self._process: subprocess.Popen[bytes] | None = None
        self.paused = False
        self.samples: list[dict[str, list[Sample]]] = []
        """What was seen of each of its processes, by task."""
        self.unexpected: list[str] = []
        """Ends that nobody asked for, each with the end of the log."""
        self._workers: list[int] = []

    # -- what is done to it

    def start(self) -> None:
        """Start it; fine when it runs."""
        if self.running:
            return
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "streamproc", "run", "-c", str(self._file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,  # Ctrl-C is for the one who started the run
            )
        self.samples.append(defaultdict(list))

    def kill(self) -> None:
        """End it without warning; its workers notice by themselves."""
        self.watch()
        process, self._process = self._process, None
        self.paused = False
        if process is not None:
            process.kill()
            process.wait(timeout=30)

    async def terminate(self) -> None:
        """Tell it to stop, and expect it to do so in order."""
        self.watch()
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, STOP_WITHIN_S)
        if process.poll() is None:
            process.kill()
            process.wait(timeout=30)
            self._blame(f"did not stop within {STOP_WITHIN_S:g} s of SIGTERM")
        elif process.returncode != 0:
            self._blame(f"ended with {process.returncode} after SIGTERM")

    def pause(self) -> None:
        """Stop its clock and that of its workers, as a suspended machine does."""
        if self._process is not None:
            self.paused = True
            for pid in (self._process.pid, *self._children()):
                _signal(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        if self._process is not None:
            for pid in (*self._children(), self._process.pid):
                _signal(pid, signal.SIGCONT)
        self.paused = False

    def kill_worker(self, index: int) -> bool:
        """End a worker without warning; whether there was one."""
        if index >= len(self._workers):
            return False
        return _signal(self._workers[index], signal.SIGKILL)

    # -- what is seen of it

    @property
    def pid(self) -> int | None:
        """Its process id, while it has one."""
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def watch(self) -> None:
        """Notice an end that nobody asked for."""
        if self._process is not None and self._process.poll() is not None:
            code, self._process = self._process.returncode, None
            self.paused = False
            self._blame(f"ended by itself with {code}")

    def _blame(self, what: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            what += "\n" + "\n".join(self.log_file.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        self.unexpected.append(f"replica {self.index} {what}")

    async def why_not_ready(self, client: httpx.AsyncClient) -> str | None:
        """What it says that it waits for; None when it is ready."""
        if not self.running or self.paused:
            return f"replica {self.index} does not run"
        try:
            answer = await client.get(f"{self.url}/readyz")
        except httpx.HTTPError as error:
            return f"replica {self.index} does not answer: {error!r}"
        return None if answer.status_code == 200 else f"replica {self.index}: {answer.text}"

    async def poll(self, client: httpx.AsyncClient) -> None:
        """Ask for its status until cancelled."""
        while True:
            self.watch()
            await self.look(client)
            await asyncio.sleep(POLL_S)

    async def look(self, client: httpx.AsyncClient) -> None:
        """Ask for its status once."""
        if self.running and not self.paused:
            with contextlib.suppress(httpx.HTTPError, ValueError):
                answer = await client.get(f"{self.url}/status")
                if answer.status_code == 200:
                    self._seen(orjson.loads(answer.content))

    def _seen(self, status: dict[str, Any]) -> None:
        self._workers = [it["pid"] for it in status["workers"] if it["pid"]]
        at_ms = int(time.time() * 1_000)
        for name, task in status["tasks"].items():
            held = dict(self._held(name, it) for it in task["partitions"])
            self.samples[-1][name].append((at_ms, held))

    def _held(self, task: str, partition: dict[str, Any]) -> tuple[int, tuple[int, int]]:
        """A partition, and the offsets that were committed and read."""
        number, position, committed = partition["partition"], partition["position"], partition["committed"]
        if committed is None:  # under this assignment, so far
            committed = self._committed(task, number)
        return number, (committed, max(committed, position or 0))

    def assignments(self, task: str) -> list[int]:
        """When partitions of a task were assigned to it, in milliseconds since 1970, from its log."""
        return [
            int(datetime.fromisoformat(orjson.loads(line)["ts"]).timestamp() * 1_000)
            for line in self.log_file.read_bytes().splitlines()
            if b"task %s: " % task.encode() in line
            if b" assigned in group " in line or b"no partition is left" in line
        ]

    def count_in_log(self, words: bytes) -> int:
        """How many lines of its log have these words."""
        return sum(words in line for line in self.log_file.read_bytes().splitlines())

    def _children(self) -> list[int]:
        assert self._process is not None
        try:
            return [child.pid for child in psutil.Process(self._process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
