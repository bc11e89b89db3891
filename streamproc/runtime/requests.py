"""Records that came over HTTP, from the request's acceptance to its answer.

A request takes a place when its first byte is there, holds bytes as its body comes, and hands in its records as one
span of a lease of its own: of no partition, so that they need neither order nor offsets. In batches they are records
like any others, and fail, are tried again and are isolated like them; but what becomes of them goes back in the answer,
and counts for no circuit: nobody shall stop a stream by sending nonsense to its side door.

Passive: no I/O and no timer; whoever waits for the answer says when its time is over, and when its client has left.
Nothing is retried here, and requests have no order.

Invariants:

- A request ends exactly once: with all of its results and failures, or with the reason for which there are none.
- Its place and its bytes are free from that moment on; what comes later of its records counts for nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from streamproc.errors import RequestError, RequestsFullError
from streamproc.observe.metric_table import RequestOutcome
from streamproc.observe.prediction import Prediction
from streamproc.records import NO_PARTITION, Failure, Lease, Outcome, Span, Status, TopicPartition, Trace
from streamproc.runtime.failures import decode_failure
from streamproc.settings import PredictSettings

FULL_RETRY_AFTER_S = 1


class RequestRecord(NamedTuple):
    """A record of a request: what a worker needs of a record, and no more. ``offset`` is its index in the request."""

    offset: int
    timestamp: int
    value: bytes
    key: None = None
    headers: tuple[()] = ()


class RequestEvents(NamedTuple):
    """What requests tell their owner: records to run; and an end, after so many seconds, with what it is counted as."""

    on_records: Callable[[Span], None]
    on_ended: Callable[[Lease, RequestOutcome, float], None]


class Request:
    """One request of a client. ``Requests.open`` makes it; ``leave`` has to be called at last, in any case."""

    def __init__(self, requests: Requests, lease: Lease, arrived_at: float) -> None:
        self.lease = lease
        self.arrived_at = arrived_at
        self.size_bytes = 0
        self._requests = requests
        self._answer: asyncio.Future[Prediction | RequestError] | None = None
        self._refusal: RequestError | None = None
        self._values: list[bytes | Failure | None] = []
        self._missing = 0
        self._metrics: dict[int, bytes] = {}

    @property
    def is_submitted(self) -> bool:
        """Whether its records are here."""
        return self._answer is not None

    def hold(self, size_bytes: int) -> None:
        """Take in so many more bytes. Raises RequestsFullError where the limit does not allow them."""
        self._requests.hold(self, size_bytes)

    def submit(self, values: Sequence[bytes], trace: Trace | None = None) -> asyncio.Future[Prediction | RequestError]:
        """Hand in its records, one at least, once; ``trace`` is what is traced of the request.

        Answers a future that gets the answer, or why there is none; that of a request which leaves gets nothing.
        """
        self._answer = asyncio.get_running_loop().create_future()
        self._values = [None] * len(values)
        self._missing = len(values)
        if self._refusal is None:
            self._requests.submit(self, values, trace)
        else:
            self._answer.set_result(self._refusal)
        return self._answer

    def leave(self, outcome: RequestOutcome = "left") -> None:
        """End it where it has not ended yet; records that no worker has got are not run."""
        self._requests.end(self, outcome)

    # -- for ``Requests``

    def take(self, outcome: Outcome) -> bool:
        """Keep what became of some of its records; whether that was all."""
        self._metrics.setdefault(outcome.report.batch.id, outcome.report.metrics)
        for index, (status, value) in enumerate(zip(outcome.statuses, outcome.values, strict=True), outcome.span.first):
            if self._values[index] is None:
                self._missing -= 1
            if isinstance(value, Failure):
                self._values[index] = value
            else:
                self._values[index] = bytes(value) if status == Status.RESULT else decode_failure(value)
        return not self._missing

    def answer(self, now: float) -> RequestOutcome:
        """Give the answer to whoever waits for it; what it counts as."""
        values = [value for value in self._values if value is not None]
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Prediction(values, list(self._metrics.values()), (now - self.arrived_at) * 1_000))
        return "failed" if any(isinstance(value, Failure) for value in values) else "ok"

    def refuse(self, error: RequestError) -> None:
        """Tell whoever waits, or will, that there are no results."""
        self._refusal = error
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(error)


class Requests:
    """The requests of one task that have no answer yet.

    Args:
        topic: The topic by whose schema the records are checked.
        settings: The limits.
        events: What the owner is told.
        clock: Seconds; does not go back.
        wall_clock: Seconds since 1970.
    """

    def __init__(
        self,
        topic: str,
        settings: PredictSettings,
        events: RequestEvents,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._partition = TopicPartition(topic, NO_PARTITION)
        self._settings = settings
        self._events = events
        self._clock = clock
        self._wall_clock = wall_clock
        self.waiting: dict[Lease, Request] = {}
        """Those that have no answer yet."""
        self._opened = 0
        self.size_bytes = 0
        """Bytes of the bodies of those that wait."""

    def __len__(self) -> int:
        return len(self.waiting)

    def waits(self, lease: Lease) -> bool:
        """Whether somebody waits for the results of this request."""
        return lease in self.waiting

    def leases(self) -> list[Lease]:
        """The leases of those that wait."""
        return list(self.waiting)

    def incomplete(self) -> list[Lease]:
        """The leases of those whose records are not here yet."""
        return [lease for lease, request in self.waiting.items() if not request.is_submitted]

    def open(self) -> Request:
        """Give a request a place. Raises RequestsFullError where none is left."""
        if len(self.waiting) >= self._settings.max_requests:
            raise RequestsFullError(
                f"{len(self.waiting)} requests wait for their results, as many as http.predict.max_requests allows",
                retry_after_s=FULL_RETRY_AFTER_S,
            )
        self._opened += 1
        request = Request(self, Lease(self._partition, self._opened), self._clock())
        self.waiting[request.lease] = request
        return request

    def hold(self, request: Request, size_bytes: int) -> None:
        """Count bytes of a request that waits. Raises RequestsFullError where that is too much."""
        limit = self._settings.max_waiting_bytes
        if self.size_bytes + size_bytes > limit:
            raise RequestsFullError(
                f"{self.size_bytes} bytes of requests wait for their results, and http.predict.max_waiting_bytes is "
                f"{limit}",
                retry_after_s=FULL_RETRY_AFTER_S,
            )
        if self.waits(request.lease):
            request.size_bytes += size_bytes
            self.size_bytes += size_bytes

    def submit(self, request: Request, values: Sequence[bytes], trace: Trace | None) -> None:
        """Hand the records of a request that waits to the owner."""
        timestamp = int(self._wall_clock() * 1_000)
        records = [RequestRecord(index, timestamp, value) for index, value in enumerate(values)]
        span = Span(request.lease, 0, records, [len(value) for value in values], self._clock())
        if trace is not None:
            span.traces = dict.fromkeys(range(len(records)), trace)
        self._events.on_records(span)

    def complete(self, outcome: Outcome) -> None:
        """Some records of a request were executed, or failed for good."""
        request = self.waiting.get(outcome.span.lease)
        if request is not None and request.take(outcome):
            self.end(request, request.answer(self._clock()))

    def refuse(self, lease: Lease, error: RequestError) -> None:
        """A request gets no results, for this reason."""
        request = self.waiting.get(lease)
        if request is not None:
            request.refuse(error)
            self.end(request, "unavailable")

    def end(self, request: Request, outcome: RequestOutcome) -> None:
        """A request is over; the second time nothing happens."""
        if self.waiting.pop(request.lease, None) is not None:
            self.size_bytes -= request.size_bytes
            self._events.on_ended(request.lease, outcome, self._clock() - request.arrived_at)
