"""Header names that aiokafka would not write."""

from __future__ import annotations

from typing import Self


class RawName(str):
    """A name whose bytes need not be UTF-8."""

    __slots__ = ("raw",)

    raw: bytes

    def __new__(cls, raw: bytes) -> Self:
        name = super().__new__(cls, raw.decode(errors="backslashreplace"))
        name.raw = raw
        return name

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:  # noqa: ARG002 - str's own signature
        """The bytes as they were given."""
        return self.raw
