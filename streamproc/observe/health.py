"""Health: what the sidecar asks of a processor, and how a stall is told from work.

``ProcessorView`` is all that the HTTP application knows of a processor. ``ProgressWatch`` decides liveness by progress:
a process that answers probes but commits nothing while records wait is not alive.
"""

from __future__ import annotations

from typing import Protocol, Self

from pydantic import BaseModel, ConfigDict

from streamproc.observe.prediction import PredictRequest
from streamproc.observe.status import CircuitStatus, ProcessorStatus


class Health(BaseModel):
    """The answer to a probe. ``reasons`` are sentences that say why it is not ok; empty when it is."""

    model_config = ConfigDict(frozen=True)

    ok: bool
    reasons: list[str]

    @classmethod
    def of(cls, *reasons: str) -> Self:
        """Ok without reasons, not ok with any."""
        return cls(ok=not reasons, reasons=list(reasons))


class HealthSummary(BaseModel):
    """Both probes at once; ``ok`` when both are."""

    model_config = ConfigDict(frozen=True)

    ok: bool
    live: Health
    ready: Health


class ProcessorView(Protocol):
    """A processor as the sidecar sees it. Each call answers at once, from memory, in the event loop."""

    def live(self) -> Health:
        """Whether the process does its work; when not, it should be restarted."""

    def ready(self) -> Health:
        """Whether the process can take work: partitions assigned, workers warm, nothing stopped."""

    def status(self) -> ProcessorStatus:
        """Everything worth seeing."""

    @property
    def stopping(self) -> bool:
        """Whether it is on its way out, so that nothing can be changed any more."""

    def request(self, task: str) -> PredictRequest:
        """A place for a prediction. Raises RequestError where the task takes none."""

    def open_circuit(self, task: str) -> CircuitStatus | None:
        """Pause a task by hand; None where there is no such task."""

    def close_circuit(self, task: str) -> CircuitStatus | None:
        """Let a task go on; None where there is no such task."""


class ProgressWatch:
    """Watches the committed offset of one partition, or of a task as a sum: lag with no movement is a stall.

    Time is passed in, in seconds of a clock that does not go back. A batch that computes commits nothing until it is
    done, so ``stalled_after_s`` has to be longer than a batch may take, its retries and back-off included.
    """

    def __init__(self, stalled_after_s: float) -> None:
        if stalled_after_s <= 0:
            raise ValueError(f"stalled_after_s is {stalled_after_s:g} and has to be above 0")
        self._stalled_after_s = stalled_after_s
        self._committed: int | None = None
        self._waiting_since: float | None = None

    def observe(self, lag: int, committed: int, now: float) -> None:
        """Take what is known now. A committed offset that moves in either direction is a movement."""
        if lag <= 0:
            self._waiting_since = None
        elif self._waiting_since is None or committed != self._committed:
            self._waiting_since = now
        self._committed = committed

    def stalled(self, now: float) -> float | None:
        """For how many seconds records have waited without progress, if that is too long; else ``None``.

        It goes by the last observation: where lag cannot be observed any more, records seen waiting still wait.
        """
        if self._waiting_since is None:
            return None
        waiting_s = now - self._waiting_since
        return waiting_s if waiting_s >= self._stalled_after_s else None
