"""Takes values from a fuzzer's bytes. Never fails: where the bytes are used up, everything is zero, empty or first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

INT64 = (-(2**63), -(2**63) + 1, -1, 0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1)


class Take:
    """A cursor over the bytes of one input."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """How many bytes there still are."""
        return max(0, len(self._data) - self._at)

    def byte(self) -> int:
        """The next byte."""
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def bit(self) -> bool:
        """True or false."""
        return self.byte() & 1 == 1

    def below(self, limit: int) -> int:
        """A number from 0, less than ``limit``, which is at most 65,536."""
        return (self.byte() if limit <= 256 else self.byte() << 8 | self.byte()) % limit

    def int64(self) -> int:
        """A signed number of 64 bits; those at the edges are as likely as all others together."""
        kind = self.byte()
        if kind < 128:
            return INT64[kind % len(INT64)]
        if kind < 192:
            return self.byte()
        return int.from_bytes(self.bytes_of(8), "little", signed=True)

    def one_of(self, choices: Sequence[T]) -> T:
        """One of these."""
        return choices[self.below(len(choices))]

    def bytes_of(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer at the end."""
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def blob(self, most: int = 255) -> bytes:
        """Some bytes, of a length that is taken too."""
        return self.bytes_of(self.below(most + 1))

    def rest(self) -> bytes:
        """All that is left."""
        return self.bytes_of(self.left)


def mutated(data: bytes, take: Take) -> bytes:
    """``data`` with a few bytes changed, removed, doubled, or put in."""
    changed = bytearray(data)
    for _ in range(1 + take.below(4)):
        at = take.below(min(len(changed), 65_535) + 1)
        size = 1 + take.below(16)
        match take.below(6):
            case 0:
                del changed[at : at + size]
            case 1:
                changed[at:at] = changed[at : at + size]
            case 2:
                changed[at:at] = take.bytes_of(size)
            case 3:
                del changed[at:]
            case 4:
                changed[at : at + size] = take.bytes_of(size)
            case _:
                if at < len(changed):
                    changed[at] ^= 1 << take.below(8)
    return bytes(changed)
