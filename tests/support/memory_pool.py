"""A pool in a control group with little memory, as a process of its own: the child of tests/integration/test_memory.py.

Prints, as JSON, how the batch that took memory without end came back, and then how one whose worker was killed did.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from streamproc.records import Batch, Failure, Span, value_sizes
from streamproc.runtime.pool import Pool, PoolEvents
from streamproc.settings import PoolSettings
from tests.support.asyncs import until
from tests.support.spans import FakeRecord, batch, lease

ROOT = Path(__file__).parents[2]


def make(number: int, record: dict[str, Any]) -> Batch:
    rows = [FakeRecord(offset=0, value=json.dumps(record).encode())]
    return batch([Span(lease(), 0, rows, value_sizes(rows), time.monotonic())], number=number)


def score_of(pid: int) -> int:
    """How much sooner than others the kernel takes a process when memory runs out."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def main(group: Path) -> dict[str, Any]:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    setup = {
        "backend": {
            "path": "tests.support.backends:Scripted",
            "loader": "local",
            "base_dir": str(ROOT),
            "config": "{}",
        },
        "tasks": {"text": {"schemas": {}, "envelope": "result", "max_value_bytes": 1_000, "warmup": []}},
        "shared_memory_threshold_bytes": 262_144,
        "logging": {"level": "error", "format": "json"},
    }
    failures: list[Failure] = []
    restarts: list[str] = []
    events = PoolEvents(
        on_reply=lambda _: None,
        on_failed=lambda _, failure, __, ___: failures.append(failure),
        on_room=lambda: None,
        on_restart=restarts.append,
        on_fatal=lambda error: sys.exit(str(error)),
    )
    pool = Pool(PoolSettings(restart_backoff_ms=10), setup, events, time.monotonic)
    await pool.start()
    await until(lambda: pool.idle() == 1, "a worker is ready")
    (worker,) = pool.workers()
    scores = [score_of(pid) for pid in (os.getpid(), worker.pid)]
    pool.submit(make(1, {"id": 1, "do": "allocate"}))
    await until(lambda: failures, "the kernel ends the worker", deadline_s=60)
    await until(lambda: pool.idle() == 1, "another is ready")
    (worker,) = pool.workers()
    pool.submit(make(2, {"id": 2, "do": "compute", "until": str(group / "never")}))
    os.kill(worker.pid, signal.SIGKILL)
    await until(lambda: len(failures) == 2, "the killed worker's batch comes back")
    await pool.stop()
    return {"causes": [it.cause for it in failures], "restarts": restarts, "scores": scores}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(main(Path(sys.argv[1])))))
