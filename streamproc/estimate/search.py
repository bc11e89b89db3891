"""Which batches to measure: per length twice the size each time, until memory, the limit or the time ends it.

Each length begins in a fresh process, smallest batch first, so that what an allocator keeps of a larger batch does not
count for a smaller one. Where memory ends it, the sizes between the last that fitted and the first that did not are
searched until they are within 5 % of each other, or until memory's growth says that nothing larger fits.

All times are taken once more at the end, shuffled: what disturbs a machine for a while then disturbs one of two.

What was held out is measured afterwards, in the order of its predicted memory for the same reason, and then once more
in a process that has seen all of it, shuffled, as a worker would.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from streamproc.errors import EstimateError
from streamproc.estimate.fit import Seen
from streamproc.estimate.prober import End, Ran
from streamproc.estimate.samples import Sample, Samples

GAP = 1.05
"""A size that fits and one that does not are near enough to each other at this ratio."""
MAX_LENGTHS, MIN_LENGTHS = 8, 3
LOADING_SHARE = 0.2
"""Of the time: what loading the backend again for each length may take, or there are fewer lengths."""
HELD_OUT = 12
AGAIN_SHARE, HELD_OUT_SHARE = 0.25, 0.25
"""Of the time: what is kept for a second look at all times, and for the shapes that are held out."""
SHAPE_SHARE = 0.1
"""Of a length's time: what the repetitions of one shape may take."""
BATCHES = 7
"""Of a shape, for as many runs."""
FAILED_SHARE = 0.5


class Probing(Protocol):
    """What runs batches: ``prober.Prober``, or a stand-in."""

    def start(self) -> Any:
        """A fresh process."""

    def run(
        self, batches: Sequence[Sequence[dict[str, Any]]], *, seconds: float, runs: int = BATCHES, fresh: bool = True
    ) -> Ran | End:
        """Run batches of one shape."""


@dataclass(slots=True)
class Explored:
    """What was found at one length."""

    length: int
    cut: bool
    """Whether its longest record was cut to this length."""
    seen: list[Seen] = field(default_factory=list)
    ended_by: Literal["size", "memory", "time"] = "size"
    too_large: int | None = None
    """The least size that memory was seen to be too little for."""

    @property
    def largest(self) -> int:
        """The largest size that fitted; 0 where none did."""
        return max((it.size for it in self.seen), default=0)


class Search:
    """Measures shapes.

    Args:
        prober: Runs batches.
        samples: What they are made of.
        max_size: Most records of a batch.
        budget_bytes: Most memory of the process.
        seconds: How long all of it may take, about.
        load_seconds: How long loading the backend takes.
        clock: Monotonic, in seconds.
        seed: Of the records that are drawn.
        progress: Told what is measured.
    """

    def __init__(
        self,
        prober: Probing,
        samples: Samples,
        *,
        max_size: int,
        budget_bytes: float,
        seconds: float,
        load_seconds: float,
        clock: Callable[[], float],
        seed: int = 0,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._prober = prober
        self._samples = samples
        self._max_size = max_size
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._until = clock() + seconds
        self._explore_s = seconds * (1 - AGAIN_SHARE - HELD_OUT_SHARE)
        self._again_s = seconds * AGAIN_SHARE
        affordable = int(seconds * LOADING_SHARE / max(load_seconds, 1e-3))
        self._lengths = samples.lengths(min(max(affordable, MIN_LENGTHS), MAX_LENGTHS))
        self._load_seconds = load_seconds
        self._rng = random.Random(seed)  # noqa: S311 - a choice of samples, no secret
        self._progress = progress
        self.ran = 0
        self.failed = 0
        """Of the records that ran, those that failed by themselves."""

    def explore(self) -> list[Explored]:
        """Measure at each length.

        Raises:
            EstimateError: not even a single record fits, or the records fail.
            BackendError: the backend failed.
        """
        begun = self._clock()
        found: list[Explored] = []
        # The longest first, where memory ends: what time is left out of is the least of it.
        for left, length in zip(range(len(self._lengths), 0, -1), reversed(self._lengths), strict=True):
            self._prober.start()
            remaining = begun + self._explore_s - (left - 1) * self._load_seconds - self._clock()
            found.append(self._explore_length(self._samples.near(length), max(remaining, 0.0) / left))
        if not any(it.seen for it in found):
            raise EstimateError(
                f"not even the shortest record fits into {self._budget_bytes / 2**20:,.0f} MiB; give the workers more "
                "memory, or use a smaller model"
            )
        found.reverse()
        every = [seen for it in found for seen in it.seen]
        again = iter(self._again(every, self._again_s))
        for it in found:
            it.seen = [next(again) for _ in it.seen]
        return found

    def _again(self, shapes: Sequence[Seen], seconds: float) -> list[Seen]:
        """The same shapes with the lesser of two medians, the second of which was taken at another moment.

        Whatever else ran on the machine has only ever made a batch slower, and mostly for a while.
        """
        begun = self._clock()
        order = list(range(len(shapes)))
        self._rng.shuffle(order)
        self._prober.start()
        found = list(shapes)
        for done, at in enumerate(order):
            it = shapes[at]
            share = max(begun + seconds - self._clock(), 0.0) / (len(order) - done)
            if share < 2 * it.time_ms / 1_000:
                continue
            seen = self._measure(it.size, self._samples.near(it.length), share / 2)
            if isinstance(seen, Seen) and seen.time_ms < it.time_ms:
                found[at] = replace(it, time_ms=seen.time_ms)
        return found

    def _explore_length(self, longest: Sample, share_s: float) -> Explored:
        until = self._clock() + share_s
        found = Explored(longest.length, longest.cut)
        size = 1
        while True:
            seen = self._measure(size, longest, share_s * SHAPE_SHARE)
            if isinstance(seen, End):
                found.ended_by = "memory" if seen is End.MEMORY else "time"
                if seen is End.MEMORY:
                    found.too_large = size
                break
            found.seen.append(seen)
            if size >= self._max_size:
                break
            size = min(size * 2, self._max_size)
            # A first run and one that counts, each twice as long as the last.
            if self._clock() + 4 * seen.time_ms / 1_000 > until:
                found.ended_by = "time"
                break
        if found.too_large is not None:
            self._close_in(found, longest, share_s * SHAPE_SHARE)
        return found

    def _close_in(self, found: Explored, longest: Sample, seconds: float) -> None:
        """Search between the largest size that fitted and the least that did not."""
        while found.too_large is not None and found.too_large > max(found.largest * GAP, found.largest + 1):
            if found.largest == 0:
                return
            likely = self._likely_most(found)
            if likely is not None and likely <= max(found.largest * GAP, found.largest + 1) and len(found.seen) > 2:
                return
            middle = round((found.largest * found.too_large) ** 0.5)
            if likely is not None and found.largest < likely < found.too_large:
                middle = likely
            middle = min(max(middle, found.largest + 1), found.too_large - 1)
            seen = self._measure(middle, longest, seconds)
            if isinstance(seen, Seen):
                found.seen.append(seen)
            elif seen is End.MEMORY:
                found.too_large = middle
            else:
                return

    def _likely_most(self, found: Explored) -> int | None:
        """The size at which memory ends, were it to grow as between the two largest."""
        known = sorted(found.seen, key=lambda it: it.size)[-2:]
        if len(known) < 2 or known[1].peak_bytes <= known[0].peak_bytes:
            return None
        each = (known[1].peak_bytes - known[0].peak_bytes) / (known[1].size - known[0].size)
        return int(known[1].size + (self._budget_bytes - known[1].peak_bytes) / each)

    def held_out(self, largest: Callable[[int], int], predicted_bytes: Callable[[int, int], float]) -> list[Seen]:
        """Measure shapes that nothing was fitted to.

        Args:
            largest: The largest size of a length that is to be relied on.
            predicted_bytes: The memory of a shape.
        """
        shapes = self._other_shapes(largest)
        shapes.sort(key=lambda it: predicted_bytes(it[0], it[1].length))
        self._prober.start()
        found = []
        for index, (size, longest) in enumerate(shapes):
            share = max(self._until - self._clock(), 1.0) / (len(shapes) - index)
            seen = self._measure(size, longest, share / 4)
            if isinstance(seen, Seen):
                found.append(seen)
            elif seen is End.MEMORY:
                # It holds less than the budget by prediction, and needed more.
                found.append(Seen(size, longest.length, float("inf"), self._budget_bytes * GAP))
        return self._again(found, max(self._until - self._clock(), 1.0))

    def mixed(self, shapes: Sequence[tuple[int, int]]) -> float:
        """The most memory of a process that ran batches of all these sizes and lengths, twice, in any order."""
        order = [*shapes, *shapes]
        self._rng.shuffle(order)
        self._prober.start()
        most = 0.0
        for size, length in order:
            seen = self._measure(size, self._samples.near(length), 0.0, fresh=False)
            most = max(most, seen.peak_bytes if isinstance(seen, Seen) else self._budget_bytes * GAP)
        return most

    def _other_shapes(self, largest: Callable[[int], int]) -> list[tuple[int, Sample]]:
        least, most = self._samples.reach
        shapes = []
        for _ in range(HELD_OUT):
            wanted = max(least, 1) * (most / max(least, 1)) ** self._rng.random()
            longest = self._samples.near(round(wanted))
            size = round(max(largest(longest.length), 1) ** self._rng.random())
            shapes.append((size, longest))
        return shapes

    def _measure(self, size: int, longest: Sample, seconds: float, *, fresh: bool = True) -> Seen | End:
        self._progress(f"{size} × {longest.length}")
        # Several, since records of one length differ in what they cost.
        batches = [self._samples.batch(size, longest.length, self._rng) for _ in range(BATCHES)]
        ran = self._prober.run(batches, seconds=seconds, fresh=fresh)
        if isinstance(ran, End):
            return ran
        self.ran += size
        self.failed += ran.failed
        if ran.failed > FAILED_SHARE * size:
            raise EstimateError(
                f"{ran.failed} of {size} sample records fail, and failures cost less than results; "
                "see `streamproc check`, and give records that pass"
            )
        if ran.peak_bytes > self._budget_bytes:
            self._prober.start()
            return End.MEMORY
        length = statistics.fmean(map(self._samples.longest, batches[: len(ran.times_ms)]))
        return Seen(size, round(length), statistics.median(ran.times_ms), float(ran.peak_bytes))
