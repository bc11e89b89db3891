"""Replays a capture: each record when it is due, into the topics that the lanes say.

Invariants:

- Records are written in the file's order, per partition, and not before they are due (by more than ``EARLY_S``).
- No more is in memory than what a producer queues and ``RECORDS_AHEAD`` records of the file.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice

from streamproc.broker.interface import Admin
from streamproc.errors import StreamprocError
from streamproc.record_lines import PlacedRecord
from streamproc.records import TopicPartition
from streamproc.replay.lanes import Lanes
from streamproc.replay.pace import Pace, Unpaced

RECORDS_AHEAD = 2_000
PACED_RECORDS_AHEAD = 100
"""Reading takes microseconds a record: not so many at once that what is due meanwhile comes late."""
EARLY_S = 0.0005
_MIN_PAUSE_S = 0.001
"""The event loop's timers know whole milliseconds."""
_WAIT_STEP_S = 0.2


class ReplayError(StreamprocError):
    """A capture cannot be replayed as it was asked for."""


def make_run_id(now: float, rng: random.Random) -> str:
    """An id for a run: when it began, and something to tell it from others of that second."""
    return f"replay-{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%S}-{rng.randrange(1 << 16):04x}"


async def replay(
    records: Iterator[PlacedRecord],
    lanes: Lanes,
    pace: Pace,
    *,
    clock: Callable[[], float],
    before_sending: Callable[[Sequence[PlacedRecord]], Awaitable[None]] | None = None,
) -> None:
    """Write records when they are due, and wait until all are acknowledged.

    Args:
        records: The capture.
        lanes: Where to write.
        pace: When each record is due.
        clock: Seconds, of a clock that does not go back.
        before_sending: Awaited with the next records, to hold up a run whose readers do not keep up.

    Raises:
        StreamprocError: reading or writing failed.
    """
    ahead = RECORDS_AHEAD if isinstance(pace, Unpaced) else PACED_RECORDS_AHEAD
    begun, started = clock(), False
    while chunk := list(islice(records, ahead)):
        if before_sending is not None:
            await before_sending(chunk)
        await lanes.prepare(chunk)
        if not started:
            begun, started = clock(), True  # what the first records had to wait for is no part of the pace
        dues = [pace.due(record.timestamp) for record in chunk]
        sent = 0
        while sent < len(chunk):
            now = clock() - begun
            due = bisect_right(dues, now + EARLY_S, sent)
            if due > sent:
                await lanes.send(chunk[sent:due], dues[sent:due], now)
                sent = due
                await asyncio.sleep(0)  # a queue that takes everything gives nobody else a turn
            else:
                await lanes.pause(max(_MIN_PAUSE_S, dues[sent] - now))
            await lanes.write_gathered(clock() - begun)
    await lanes.finish(clock() - begun)


async def wait_for_groups(
    admin: Admin,
    groups: Collection[str],
    partitions: Collection[tuple[str, int]],
    *,
    timeout_s: float,
    clock: Callable[[], float],
    on_lag: Callable[[int], None],
) -> None:
    """Wait until consumer groups have committed everything in these partitions.

    Raises:
        ReplayError: a group has committed nothing further for ``timeout_s``.
        BrokerError: Kafka does not answer.
    """
    listed = [TopicPartition(*it) for it in partitions]
    last: Mapping[str, int] = {}
    since = clock()
    while True:
        ends = await admin.end_offsets(listed)
        lags: dict[str, int] = {}
        for group in groups:
            committed = await admin.committed(group, listed)
            lags[group] = sum([max(0, ends[it] - committed.get(it, 0)) for it in listed])
        on_lag(max(lags.values(), default=0))
        if not any(lags.values()):
            return
        if lags != last:
            last, since = lags, clock()
        elif clock() - since >= timeout_s:
            group = max(lags, key=lambda it: lags[it])
            raise ReplayError(
                f"group {group} is behind (lag {lags[group]:,}) and has committed nothing for {timeout_s:g} s; see "
                f"whether its processor runs (`streamproc lag`), or wait longer with --wait-timeout"
            )
        await asyncio.sleep(_WAIT_STEP_S)
