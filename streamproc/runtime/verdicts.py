"""What becomes of a record that failed, by its cause: a dead letter, a deliberate drop, or the end of the processor.

Passive but for the log. Whatever is given up is counted, and the log says so from time to time: how many, why, and
where the last one was.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from streamproc.errors import TaskStoppedError
from streamproc.observe.metrics import MAX_FAILURE_KINDS, TaskMetrics
from streamproc.records import Cause, Failure, Outcome, Record, Status, TopicPartition, trace_id
from streamproc.runtime.failures import decode_failure
from streamproc.settings import ErrorSettings, Then

SAY_EVERY_S = 10.0
MAX_REASONS = 5

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """Records of a task since the start."""

    taken: int = 0
    results: int = 0
    dead: int = 0
    dropped: int = 0
    retried: int = 0
    within: int = 0
    """Answered within the task's target."""
    beyond: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    """Of these no records but requests over HTTP that have ended, by what became of them."""


@dataclass(slots=True)
class GivenUp:
    """Records of a task that were given up for one reason since the start, and where the last one was."""

    kind: str
    """The type of the error, or ``other``."""
    failure: Failure
    partition: TopicPartition
    offset: int
    dead: int = 0
    dropped: int = 0


class Verdicts:
    """The failed records of one task."""

    def __init__(
        self,
        task: str,
        settings: ErrorSettings,
        *,
        topic: str,
        metrics: TaskMetrics,
        counts: Counts,
        on_stop: Callable[[TaskStoppedError], None],
    ) -> None:
        """``topic`` is that of the dead letters; ``on_stop`` is told where the settings say to stop."""
        self._task = task
        self.reload(settings)
        self._topic = topic
        self._metrics = metrics
        self._counts = counts
        self._on_stop = on_stop
        self._reasons: Counter[str] = Counter()
        self._last: tuple[Failure, TopicPartition, Record] | None = None
        self._quiet_until = -math.inf
        self._given_up: dict[tuple[str, str, str], GivenUp] = {}

    def reload(self, settings: ErrorSettings) -> None:
        """Go by another policy."""
        self._settings = settings
        self._policies = {cause: settings.policy(cause) for cause in Cause}

    def judge(self, outcome: Outcome) -> Outcome | None:
        """The outcome with what the policy says of each failed record, by its cause; None where it says stop."""
        statuses, values = bytearray(outcome.statuses), list(outcome.values)
        for index, (status, value) in enumerate(zip(statuses, values, strict=True)):
            if status == Status.FAILED:
                values[index] = value if isinstance(value, Failure) else decode_failure(value)
        failures = [(index, value) for index, value in enumerate(values) if isinstance(value, Failure)]
        partition, records = outcome.span.lease.partition, outcome.span.records
        for index, failure in failures:
            if self._policies[failure.cause].then == "stop":
                self.of(failure, partition, records[index])
                return None
        for index, failure in failures:
            if self.of(failure, partition, records[index]) == "drop":
                statuses[index] = Status.DROPPED
        return Outcome(outcome.span, bytes(statuses), values, outcome.report)

    def of(self, failure: Failure, partition: TopicPartition, record: Record) -> Then:
        """What the policy says of a record; what is to be dropped is counted as that, and a stop is told."""
        then = self._policies[failure.cause].then
        if then == "drop":
            self._metrics.dropped(failure).inc()
            self._counts.dropped += 1
            self._give_up(failure, partition, record).dropped += 1
        elif then == "stop":
            self._on_stop(self._stop(failure, partition, record))
        return then

    def dead(self, failure: Failure, partition: TopicPartition, record: Record) -> None:
        """A record became a dead letter."""
        self._reasons[f"{failure.cause}: {failure.stage} {failure.kind}"] += 1
        self._last = (failure, partition, record)
        self._metrics.dead(failure).inc()
        self._counts.dead += 1
        self._give_up(failure, partition, record).dead += 1

    def given_up(self) -> list[GivenUp]:
        """Why records were given up, the most frequent reason first; kinds beyond the first 50 as ``other``."""
        return sorted(self._given_up.values(), key=lambda it: -(it.dead + it.dropped))

    def log(self, now: float) -> None:
        """Say what became dead letters since the last time, unless that is only just past."""
        if self._last is None or now < self._quiet_until:
            return
        self._quiet_until = now + SAY_EVERY_S
        failure, partition, record = self._last
        log.warning(
            "task %s: %s became dead letters in topic %s (%s); the last: topic %s, partition %d, offset %d: %s",
            *(self._task, count_of(self._reasons.total(), "record"), self._topic),
            ", ".join(f"{reason} {count}" for reason, count in self._reasons.most_common(MAX_REASONS)),
            *(partition.topic, partition.partition, record.offset, failure.summary),
            extra={
                "task": self._task,
                "topic": partition.topic,
                "partition": partition.partition,
                "offset": record.offset,
                "cause": failure.cause,
                "stage": failure.stage,
                "error_type": failure.kind,
                "trace_id": trace_id(getattr(record, "trace", None)),
            },
        )
        self._reasons.clear()
        self._last = None

    def _give_up(self, failure: Failure, partition: TopicPartition, record: Record) -> GivenUp:
        key = (failure.cause, failure.stage, failure.kind)
        if key not in self._given_up and len(self._given_up) >= MAX_FAILURE_KINDS:
            # Kinds are type names that a backend chooses: their number has to end somewhere.
            key = (failure.cause, failure.stage, "other")
        known = self._given_up.get(key)
        if known is None:
            known = self._given_up[key] = GivenUp(key[2], failure, partition, record.offset)
        known.failure, known.partition, known.offset = failure, partition, record.offset
        return known

    def _stop(self, failure: Failure, partition: TopicPartition, record: Record) -> TaskStoppedError:
        setting = "then" if self._settings.then == "stop" else f"causes.{failure.cause}.then"
        return TaskStoppedError(
            f"task {self._task} stops, as tasks.{self._task}.on_error.{setting} says, at topic {partition.topic}, "
            f"partition {partition.partition}, offset {record.offset}: {failure.cause}: {failure.summary}; mend the "
            f"record or the backend and start again, it is not committed",
            task=self._task,
            topic=partition.topic,
            partition=partition.partition,
            offset=record.offset,
        )


def count_of(count: int, noun: str) -> str:
    """A number with its noun: ``1 record``, ``2 records``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
