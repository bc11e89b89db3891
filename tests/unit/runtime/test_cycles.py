"""What a backend leaves behind in cycles goes after its batch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from streamproc.runtime.cycles import ALL_EVERY, MANY, MIDDLE_EVERY, CyclesBetweenBatches


class Knot:
    """A cycle of one."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def cycles() -> Iterator[CyclesBetweenBatches]:
    before = gc.get_threshold()
    yield CyclesBetweenBatches()
    gc.set_threshold(*before)
    gc.unfreeze()


def test_a_cycle_is_gone_after_the_batch_that_left_it(cycles: CyclesBetweenBatches) -> None:
    left = weakref.ref(Knot())
    assert left() is not None
    cycles.look()
    assert left() is None


@pytest.mark.parametrize(("batches", "enough"), [(1, MIDDLE_EVERY), (MIDDLE_EVERY, ALL_EVERY)])
def test_a_cycle_that_outlived_batches_goes_with_a_later_one(
    cycles: CyclesBetweenBatches, batches: int, enough: int
) -> None:
    kept: list[Knot] = [Knot()]
    left = weakref.ref(kept[0])
    for _ in range(batches):
        cycles.look()
    kept.clear()
    assert left() is not None
    for _ in range(enough):
        cycles.look()
    assert left() is None


def test_a_batch_of_nested_records_is_not_looked_through(cycles: CyclesBetweenBatches) -> None:
    cycles.look()
    looked: list[str] = []
    gc.callbacks.append(lambda phase, _: looked.append(phase))
    try:
        records = [{"items": [[number]]} for number in range(MANY // 4)]
        assert looked == []
        records += [{"items": [[number]]} for number in range(MANY // 4)]
        assert looked, "however much a backend makes, it is looked at some time"
    finally:
        gc.callbacks.pop()
