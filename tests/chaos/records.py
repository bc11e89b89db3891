"""What the load writes, and what has to become of it: by the number of a record in its partition alone.

The backend, the load and the oracle agree by this file.
"""

from __future__ import annotations

import re
from enum import StrEnum

PARTITIONS = 12
SLOW_BATCH_S = 0.3
_PADDING = "x" * 40
_BROKEN = re.compile(rb"broken (\d+) (\d+)")


class Fate(StrEnum):
    """What has to become of a record."""

    RESULT = "result"
    REFUSED = "refused"
    """A dead letter: the backend gives it up."""
    BROKEN = "broken"
    """A dead letter: it is no JSON."""


def fate_of(number: int) -> Fate:
    """What has to become of the record with this number in its partition."""
    if number % 499 == 17:
        return Fate.BROKEN
    if number % 251 == 5:
        return Fate.REFUSED
    return Fate.RESULT


def is_slow(partition: int, number: int) -> bool:
    """Whether the batch with this record takes a while: a record in a minute or so."""
    return partition == 0 and number % 10_007 == 101


def value_of(partition: int, number: int) -> bytes:
    """The value to write."""
    if fate_of(number) == Fate.BROKEN:
        return b"broken %d %d" % (partition, number)
    return b'{"partition":%d,"number":%d,"text":"%s"}' % (partition, number, _PADDING.encode())


def key_of(number: int) -> bytes:
    """The key to write."""
    return b"key-%d" % (number % 97)


def answer_to(partition: int, number: int) -> int:
    """What the backend answers."""
    return (number * 31 + partition * 7) % 1_000_003


def broken_number(value: bytes) -> tuple[int, int] | None:
    """Partition and number of a value that is no JSON; None where it is not one of ours."""
    found = _BROKEN.fullmatch(value)
    return (int(found[1]), int(found[2])) if found else None
