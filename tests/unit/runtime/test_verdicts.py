"""What a task tells of the records that it gave up."""

from __future__ import annotations

import pytest

from streamproc.broker.memory_log import MemoryRecord
from streamproc.observe.metrics import MAX_FAILURE_KINDS, Metrics
from streamproc.records import Cause, Failure, Record, TopicPartition
from streamproc.runtime.verdicts import Counts, Verdicts
from streamproc.settings import ErrorSettings

PARTITION = TopicPartition("in", 2)


@pytest.fixture
def verdicts() -> Verdicts:
    settings = ErrorSettings.model_validate({"causes": {"rejected": {"then": "drop"}}})
    return Verdicts(
        "text",
        settings,
        topic="in.dead",
        metrics=Metrics().task("text"),
        counts=Counts(),
        on_stop=lambda error: pytest.fail(str(error)),
    )


def record(offset: int) -> Record:
    return MemoryRecord("in", 2, offset, 0, None, b"{}", ())


def failure(kind: str, cause: Cause = Cause.EXCEPTION, message: str = "") -> Failure:
    return Failure(cause, "execute", kind, message)


def test_each_reason_is_counted_apart_with_the_last_of_its_records_the_most_frequent_first(verdicts: Verdicts) -> None:
    verdicts.dead(failure("KeyError", message="once"), PARTITION, record(1))
    for offset in (2, 3, 4):
        verdicts.dead(failure("ValueError", message=f"at {offset}"), PARTITION, record(offset))
    for offset in (5, 6):
        assert verdicts.of(failure("RecordError", Cause.REJECTED), PARTITION, record(offset)) == "drop"
    assert verdicts.of(failure("ValueError"), PARTITION, record(7)) == "dead_letter", "counted once it is written"
    told = verdicts.given_up()
    assert [(it.kind, it.dead, it.dropped, it.partition, it.offset) for it in told] == [
        ("ValueError", 3, 0, PARTITION, 4),
        ("RecordError", 0, 2, PARTITION, 6),
        ("KeyError", 1, 0, PARTITION, 1),
    ]
    assert told[0].failure.message == "at 4"


def test_kinds_that_a_backend_makes_up_without_end_are_one_after_the_first_fifty(verdicts: Verdicts) -> None:
    for offset in range(3 * MAX_FAILURE_KINDS):
        verdicts.dead(failure(f"Error{offset}", message=str(offset)), PARTITION, record(offset))
    told = verdicts.given_up()
    assert len(told) == MAX_FAILURE_KINDS + 1
    assert (told[0].kind, told[0].dead, told[0].offset) == ("other", 100, 149)
    assert sum(it.dead for it in told) == 3 * MAX_FAILURE_KINDS
