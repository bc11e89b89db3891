"""Python's search for cycles, tuned for processes that make records by the ten thousand."""

from __future__ import annotations

import gc

MANY = 100_000
"""Containers made, and not freed, from which on cycles are looked for whatever goes on."""
MIDDLE_EVERY, ALL_EVERY = 10, 1_000


def look_for_cycles_seldom() -> None:
    """Tune the garbage collector of a process that is there for the data path.

    It makes records by the ten thousand and cycles hardly ever: looking for them as often as Python does by default
    took a seventh of the parent's time.
    """
    gc.set_threshold(MANY, 20, 20)


class CyclesBetweenBatches:
    """Looks for the cycles that a backend leaves behind after a batch, and hardly ever within one.

    A batch of nested records is some 100,000 containers, and no cycle. Python by default looks through the same ones
    several times while they are decoded, a quarter of what decoding and encoding take; after the batch they are gone.
    What there is before the first batch, imports and a model, is not looked at again.
    """

    def __init__(self) -> None:
        self._batches = 0
        gc.collect()
        gc.freeze()
        look_for_cycles_seldom()

    def look(self) -> None:
        """A batch has ended: of what is still there look at the new, now and then at the older."""
        self._batches += 1
        gc.collect(2 if self._batches % ALL_EVERY == 0 else 1 if self._batches % MIDDLE_EVERY == 0 else 0)
