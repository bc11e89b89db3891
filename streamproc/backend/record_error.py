"""How a backend gives up one record without failing the batch that it came in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RecordError:
    """Put in the place of an output, it fails that record alone; the others of the batch are delivered.

    The record goes where the task's error policy sends failed records, with ``reason`` as its message.
    """

    reason: str
