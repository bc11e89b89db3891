"""How much memory one worker may hold, and what says so: the nearest limit counts.

In this order: the command's own option; ``pool.max_worker_memory_mb``; else the least of the process's resource limits
or its device, of the control group's limit and of the machine's memory. Of the last two a fifth is left for the parent,
for what is shared and for the rest of the machine, and all workers have to share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

SHARE = 0.8
"""Of a limit that workers have in common with others."""

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Budget:
    """The memory that a worker may hold, the backend's weights included, and where the number is from."""

    size_bytes: int
    source: str


def budget_of(
    option_bytes: int | None,
    max_worker_memory_mb: int | None,
    ceiling: tuple[int, str] | None,
    workers: int,
    *,
    group_bytes: int | None,
    machine_bytes: int,
) -> Budget:
    """Choose.

    Args:
        option_bytes: What the command was told.
        max_worker_memory_mb: The setting.
        ceiling: The most that the process can hold by itself, and what says so.
        workers: How many share the group's and the machine's memory.
        group_bytes: The control group's limit.
        machine_bytes: The machine's memory.
    """
    if option_bytes is not None:
        return Budget(option_bytes, "--memory-budget")
    if max_worker_memory_mb is not None:
        return Budget(max_worker_memory_mb << 20, "pool.max_worker_memory_mb")
    shared = f" by {workers} workers" if workers > 1 else ""
    found = [Budget(int(machine_bytes * SHARE / workers), f"{SHARE:.0%} of the machine's memory{shared}")]
    if group_bytes is not None:
        found.append(Budget(int(group_bytes * SHARE / workers), f"{SHARE:.0%} of the control group's limit{shared}"))
    if ceiling is not None:
        found.append(Budget(*ceiling))
    return min(found, key=lambda it: it.size_bytes)


def machine_bytes() -> int:
    """The memory of this machine."""
    return psutil.virtual_memory().total


def group_bytes(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> int | None:
    """The least memory limit of this process's control group and of those around it, of version 1 or 2; None: none."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            limits += _limits(mount / "memory", path, "memory.limit_in_bytes")
        elif number == "0" and not controllers:
            limits += _limits(mount, path, "memory.max")
    # Version 1 has no word for "none", but a number that no machine has.
    return min((it for it in limits if it < 2**60), default=None)


def _limits(root: Path, path: str, name: str) -> list[int]:
    """Those of the group at ``path`` and of each one above it."""
    parts = [it for it in path.split("/") if it not in ("", "..")]
    found = []
    for end in range(len(parts), -1, -1):
        try:
            text = root.joinpath(*parts[:end], name).read_text().strip()
        except OSError:
            continue  # in a container the path may be told as seen from outside
        if text.isdecimal():
            found.append(int(text))
    return found
