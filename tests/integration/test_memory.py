"""The kernel's own out-of-memory killer: a worker that it takes is told from one that an operator kills."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from streamproc.runtime.memory_limits import kill_counter
from tests.support.asyncs import wait_until

ROOT = Path(__file__).parents[2]
LIMIT_BYTES = 400 << 20


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group with little memory, below our own; skipped where we may make none."""
    counter = kill_counter()
    if counter is None:
        pytest.skip("the kernel counts no out-of-memory kills for this process's control group")
    group = counter.parent / f"streamproc-test-{uuid.uuid4().hex[:8]}"
    limit = "memory.limit_in_bytes" if counter.name == "memory.oom_control" else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(LIMIT_BYTES))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group with a memory limit can be made here: {error}")
    yield group

    def removed() -> bool:
        with suppress(OSError):  # busy, as long as a process that ended is still accounted for
            group.rmdir()
        return not group.exists()

    wait_until(removed, "the control group is empty")


def test_a_worker_that_the_kernel_takes_for_memory_is_told_from_one_that_is_killed(small_group: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.memory_pool", str(small_group)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["causes"] == ["oom", "crash"]
    assert told["restarts"] == ["oom", "killed"]
    parent, worker = told["scores"]
    assert worker == min(parent + 500, 1_000), "the kernel takes the worker first"
