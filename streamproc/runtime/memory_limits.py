"""Which deaths of workers the kernel's out-of-memory killer explains: what it counts in our own control group.

A worker that it ends looks like one that an operator ends: signal 9. But it counts what it ends, per control group, and
the workers are in their parent's. So a worker that died of a signal 9 which we did not send, while the count went up,
ran out of memory.

Nothing here waits; a look is the read of one small file. Where there is no such count (macOS, the machine's root group)
nothing is explained.

Invariants: a counted kill explains one death; a kill that nobody asked about is forgotten after ``EXPLAINS_FOR_S``.
"""

from __future__ import annotations

from pathlib import Path

EXPLAINS_FOR_S = 10.0
"""A process that the kernel ends may take a while to be gone: its memory is taken from it first."""

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def kill_counter(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> Path | None:
    """The file that counts the out-of-memory kills of this process's control group, of version 1 or 2.

    In a container the group's path may be told as seen from outside, where it does not exist; then the group is what is
    mounted.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    unified: str | None = None
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            return _first_that_counts(mount / "memory", path, "memory.oom_control")
        if number == "0" and not controllers:
            unified = path
    return None if unified is None else _first_that_counts(mount, unified, "memory.events")


def _first_that_counts(root: Path, path: str, name: str) -> Path | None:
    places = (root / path.strip("/") / name, root / name)
    return next((place for place in places if read_kills(place) is not None), None)


def read_kills(counter: Path) -> int | None:
    """How many processes the kernel has ended in the group since it exists; None where the file does not say."""
    try:
        lines = counter.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("oom_kill ")]
    return int(found[0]) if found else None


class OutOfMemoryKills:
    """The kills in a control group that no death has been explained by yet."""

    def __init__(self, counter: Path | None) -> None:
        self._counter = counter
        self._known = 0
        self._known = self._count()
        self._unexplained: list[float] = []

    def look(self, now: float) -> None:
        """Note the kills since the last look; to be called every few seconds, or old ones pass for new."""
        count = self._count()
        self._unexplained += [now] * (count - self._known)
        self._known = count
        self._unexplained = [seen for seen in self._unexplained if now - seen <= EXPLAINS_FOR_S]

    def explain(self, now: float) -> bool:
        """Whether a death by signal 9 that is seen now is one of the kills; that kill explains no other."""
        self.look(now)
        if not self._unexplained:
            return False
        self._unexplained.pop(0)
        return True

    def _count(self) -> int:
        count = None if self._counter is None else read_kills(self._counter)
        return self._known if count is None else count
