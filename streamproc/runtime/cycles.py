"""Python's search for cycles, tuned for a process that makes records by the ten thousand."""

from __future__ import annotations

import gc


def look_for_cycles_seldom() -> None:
    """Tune the garbage collector of a process that is there for the data path.

    It makes records by the ten thousand and cycles hardly ever: looking for them as often as Python does by default
    took a seventh of the parent's time.
    """
    gc.set_threshold(100_000, 20, 20)
