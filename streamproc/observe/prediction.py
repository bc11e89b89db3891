"""What the sidecar asks of a processor for a prediction over HTTP, and what it gets.

Everything but the wait for the answer is at once, from memory, in the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from streamproc.errors import RequestError
from streamproc.observe.metric_table import RequestOutcome
from streamproc.records import Failure, Trace


@dataclass(frozen=True, slots=True)
class Prediction:
    """What became of a request's records: each one's result as JSON text, or its failure, in the order they came in.

    ``metrics`` are the backend's execution metrics of each batch that the records were in, as JSON; ``inference_ms`` is
    the time from the request's first byte to here.
    """

    values: Sequence[bytes | Failure]
    metrics: Sequence[bytes]
    inference_ms: float


class PredictRequest(Protocol):
    """A request's place."""

    def hold(self, size_bytes: int) -> None:
        """Take in so many more bytes of its body. Raises RequestsFullError."""

    def submit(self, values: Sequence[bytes], trace: Trace | None = None) -> asyncio.Future[Prediction | RequestError]:
        """Hand in its records; the future gets the answer, or why there is none. ``trace`` is the request's."""

    def leave(self, outcome: RequestOutcome = "left") -> None:
        """Free its place; harmless where it has ended already."""


@dataclass(frozen=True, slots=True)
class TaskInput:
    """What is known of the records that a task takes: for the documentation."""

    schema: Mapping[str, Any] | None = None
    """A JSON Schema of one record."""
    samples: Sequence[Mapping[str, Any]] = field(default_factory=list)
    description: str = ""
    result: Mapping[str, Any] | None = None
    """A JSON Schema of what the backend makes of one."""
