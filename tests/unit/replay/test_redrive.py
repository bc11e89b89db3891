"""Sending dead letters back: each of a selection once, whatever interrupts it, in order, and never in circles."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamproc.broker.memory import Operation
from streamproc.errors import BrokerError, TopicMissingError, TransactionAbortedError
from streamproc.records import Batch, BatchReport, Cause, Failure, TopicPartition
from streamproc.replay import marks
from streamproc.replay.dead_letters import Selection
from streamproc.replay.redrive import Options, Outcome, Redrive, Skip, group_of
from streamproc.runtime.envelopes import dead_letter_row
from streamproc.testing import MemoryBroker, MemoryRecord

GROUP = "app.in.dead.redrive"
PARTITIONS = 3
DEAD_PARTITIONS = 2


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def make_broker(partitions: int = PARTITIONS, configs: dict[str, str] | None = None) -> MemoryBroker:
    broker = MemoryBroker(clock=lambda: 5_000.0)
    broker.create_topic("in", partitions, configs=configs)
    broker.create_topic("in.dead", DEAD_PARTITIONS)
    return broker


def bury(
    broker: MemoryBroker,
    number: int,
    *,
    cause: Cause = Cause.EXCEPTION,
    replays: int = 0,
    key: bytes | None = None,
    topic: str = "in",
    partition: int | None = None,
    value: bytes | None = None,
    limit_bytes: int = 1_000_000,
) -> MemoryRecord:
    """Write the dead letter of a record that has this number as its offset."""
    headers: tuple[tuple[str, bytes | None], ...] = (("a", b"%d" % number),)
    if replays:
        headers = (*headers, (marks.COUNT, b"%d" % replays))
    at = number % PARTITIONS if partition is None else partition
    value = b'{"id": %d}' % number if value is None else value
    record = MemoryRecord(topic, at, number, 1_000 + number, key, value, headers)
    report = BatchReport(Batch(1, "text", [], 0.0, 0.0, "size", 1.0), worker=0, metrics=b"{}", attempts=1)
    timestamp, key, cut, written = dead_letter_row(
        TopicPartition(record.topic, record.partition),
        record,
        Failure(cause, "execute", "E", "no"),
        report,
        limit_bytes,
    )
    return broker.append(
        "in.dead",
        None if cut is None else bytes(cut),
        key=key,
        partition=number % DEAD_PARTITIONS,
        headers=written,
        timestamp=timestamp,
    )


async def redrive(
    broker: MemoryBroker,
    options: Options | None = None,
    *,
    dry: bool = False,
    transactional: bool = True,
    group: str = GROUP,
    begin: int = 0,
    end: int | None = None,
    clock: Callable[[], float] | None = None,
) -> Outcome:
    """A redrive as the command runs it. Its clock is always late, so that a rate does nothing but make chunks small."""
    async with broker.admin() as admin, broker.reader() as reader:
        transactions = broker.transactional_producer(transactional_id=group)
        plain = broker.producer()
        it: dict[str, Any] = {} if dry else {"transactions": transactions} if transactional else {"producer": plain}
        for producer in it.values():
            await producer.start()
        try:
            ends = log_ends(broker)
            return await Redrive(
                admin,
                reader,
                begins={partition: min(begin, log_end) for partition, log_end in ends.items()},
                ends={partition: log_end if end is None else min(end, log_end) for partition, log_end in ends.items()},
                group=group,
                options=options or Options(),
                clock=clock or itertools.count(step=1e9).__next__,
                **it,
            ).run()
        finally:
            for producer in it.values():
                await producer.stop()


def log_ends(broker: MemoryBroker) -> dict[TopicPartition, int]:
    return {it: broker.log(it).end for number in range(DEAD_PARTITIONS) if (it := TopicPartition("in.dead", number))}


def sent(broker: MemoryBroker) -> list[int]:
    return sorted(int(dict(it.headers)["a"] or b"") for it in broker.records("in"))


@pytest.mark.parametrize("transactional", [True, False])
def test_letters_go_back_as_they_were_to_where_they_came_from(transactional: bool) -> None:
    broker = make_broker()
    for number in range(1_234):
        bury(broker, number, key=b"k%d" % number)
    outcome = run(redrive(broker, transactional=transactional))
    assert outcome.sent == Counter({TopicPartition("in", it): len(range(it, 1_234, 3)) for it in range(3)})
    assert not outcome.skipped
    for partition in range(PARTITIONS):
        records = broker.records("in", partition)
        by_letter_partition = [[it for it in records if it.timestamp % 2 == odd] for odd in (0, 1)]
        for some in by_letter_partition:
            assert [it.timestamp for it in some] == sorted(it.timestamp for it in some)
        for it in records:
            number = it.timestamp - 1_000
            assert number % PARTITIONS == partition
            assert (it.key, it.value) == (b"k%d" % number, b'{"id": %d}' % number)
            assert it.headers == (("a", b"%d" % number), (marks.COUNT, b"1"))
    assert broker.committed(GROUP) == {TopicPartition("in.dead", it): 617 for it in range(2)}


def test_a_second_time_there_is_nothing_more_and_another_group_begins_again() -> None:
    broker = make_broker()
    for number in range(20):
        bury(broker, number)
    run(redrive(broker))
    assert run(redrive(broker)).sent.total() == 0
    for number in range(20, 25):
        bury(broker, number)
    assert run(redrive(broker)).sent.total() == 5
    assert sent(broker) == list(range(25))
    assert run(redrive(broker, group="another")).sent.total() == 25


FAULTS: Sequence[Operation] = ("write", "commit_transaction", "commit_answer", "send_batch", "getmany", "committed")


@given(
    letters=st.integers(1, 60),
    faults=st.lists(st.tuples(st.sampled_from(FAULTS), st.booleans()), max_size=6),
    stops=st.lists(st.integers(0, 60), max_size=5),
    rate=st.sampled_from([None, 8.0, 40.0]),
    limits=st.lists(st.integers(1, 20), max_size=3),
)
@example(letters=9, faults=[("commit_answer", True)] * 3, stops=[5, 7], rate=8.0, limits=[])
def test_whatever_interrupts_it_each_letter_is_sent_once(
    letters: int,
    faults: list[tuple[Operation, bool]],
    stops: list[int],
    rate: float | None,
    limits: list[int],
) -> None:
    """Errors of the broker, some of which give a transaction up, and cancellations after any number of loop turns."""
    broker = make_broker()
    for number in range(letters):
        bury(broker, number, cause=Cause.INVALID if number % 5 == 0 else Cause.EXCEPTION)
    selection = Selection(causes=("exception",))

    async def interrupted(stop: int, options: Options) -> None:
        running = asyncio.ensure_future(redrive(broker, options))
        for _ in range(stop):
            await asyncio.sleep(0)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, BrokerError):
            await running

    for operation, aborts in faults:
        broker.fail_next(operation, TransactionAbortedError("gone") if aborts else BrokerError("no"))
    for stop in stops:
        run(interrupted(stop, Options(selection, rate=rate)))
    for limit in limits:
        with contextlib.suppress(BrokerError):
            assert run(redrive(broker, Options(selection, limit=limit))).sent.total() <= limit
    for _ in range(len(faults) + 1):
        with contextlib.suppress(BrokerError):
            run(redrive(broker, Options(selection)))
    assert sent(broker) == [number for number in range(letters) if number % 5]


def test_a_commit_whose_answer_was_lost_is_told_as_done() -> None:
    broker = make_broker()
    for number in range(7):
        bury(broker, number)
    broker.fail_next("commit_answer", TransactionAbortedError("no answer"))
    assert run(redrive(broker)).sent.total() == 7
    assert sent(broker) == list(range(7))


def test_transactions_that_are_given_up_again_and_again_end_it() -> None:
    broker = make_broker()
    bury(broker, 0)
    broker.fail_next("commit_transaction", TransactionAbortedError("again"), times=9)
    with pytest.raises(TransactionAbortedError):
        run(redrive(broker))
    assert len(broker._faults["commit_transaction"]) == 6, "three were tried"
    assert sent(broker) == []


def test_the_later_of_two_redrives_goes_on_and_nothing_is_sent_twice() -> None:
    async def both(broker: MemoryBroker) -> None:
        first = asyncio.ensure_future(redrive(broker, Options(rate=8.0)))
        for _ in range(10):
            await asyncio.sleep(0)
        second = asyncio.ensure_future(redrive(broker, Options(rate=8.0)))
        done = await asyncio.gather(first, second, return_exceptions=True)
        assert all(isinstance(it, Outcome | TransactionAbortedError) for it in done)

    broker = make_broker()
    for number in range(40):
        bury(broker, number)
    run(both(broker))
    run(redrive(broker))
    assert sent(broker) == list(range(40))


def test_a_dry_run_tells_the_same_and_writes_nothing() -> None:
    broker = make_broker()
    for number in range(30):
        bury(broker, number, replays=number % 5)
    told = run(redrive(broker, dry=True))
    assert sent(broker) == []
    assert broker.committed(GROUP) == {}
    assert run(redrive(broker)) == told


def test_what_was_sent_back_too_often_was_cut_or_is_no_letter_is_skipped_and_told() -> None:
    broker = make_broker()
    bury(broker, 0)
    often = bury(broker, 2, replays=3)
    cut = bury(broker, 4, value=b"x" * 5_000, limit_bytes=2_000)
    foreign = broker.append("in.dead", b"{}", partition=0)
    outcome = run(redrive(broker))
    assert sent(broker) == [0]
    assert outcome.skipped == {Skip.REPLAYED: 1, Skip.CUT: 1, Skip.FOREIGN: 1}
    examples = {reason: places[0] for reason, places in outcome.examples.items()}
    for reason, record in ((Skip.REPLAYED, often), (Skip.CUT, cut), (Skip.FOREIGN, foreign)):
        assert examples[reason] == (record.topic, record.partition, record.offset)
    assert run(redrive(broker)) == Outcome(), "they are told once"


def test_what_was_skipped_for_its_count_can_be_chosen_by_it() -> None:
    broker = make_broker()
    bury(broker, 0)
    bury(broker, 2, replays=3)
    run(redrive(broker))
    run(redrive(broker, Options(Selection(replays=3), max_replays=4), group="another"))
    assert sent(broker) == [0, 2]
    assert dict(broker.records("in", 2)[0].headers)[marks.COUNT] == b"4"


def test_a_record_that_its_topic_does_not_take_any_more_is_skipped_alone() -> None:
    broker = make_broker(configs={"max.message.bytes": "1000"})
    for number in range(12):
        bury(broker, number, value=b"x" * (2_000 if number == 6 else 300))
    outcome = run(redrive(broker))
    assert outcome.skipped == {Skip.TOO_LARGE: 1}
    assert outcome.sent.total() == 11
    assert sent(broker) == [number for number in range(12) if number != 6]


def test_a_partition_that_is_gone_gives_way_to_that_of_the_key() -> None:
    broker = make_broker(partitions=2)
    keys = [b"k%d" % (number % 4) for number in range(40)]
    for number, key in enumerate(keys):
        bury(broker, number, key=key, partition=7)
    bury(broker, 40, partition=7)
    run(redrive(broker))
    at = {number: it.partition for it in broker.records("in") if (number := it.timestamp - 1_000) >= 0}
    assert [at[number] for number in range(40)] == [broker.partition_of_key(key, 2) for key in keys]
    assert at[40] == 7 % 2


def test_a_missing_input_topic_is_named_with_the_letter_and_what_was_sent_before_stays_done() -> None:
    broker = make_broker()
    for number in range(0, 8, 2):
        bury(broker, number)
    letter = bury(broker, 8, topic="gone")
    with pytest.raises(TopicMissingError, match=rf"input topic gone .* in\.dead:0:{letter.offset} .*topics apply"):
        run(redrive(broker, Options(rate=4.0)))
    assert sent(broker) == [0, 2, 4, 6]


def test_bounds_and_new_timestamps() -> None:
    broker = make_broker()
    for number in range(0, 20, 2):
        bury(broker, number)  # offsets 0 to 9 of partition 0
    outcome = run(redrive(broker, Options(keep_timestamps=False), begin=2, end=7))
    assert sent(broker) == [4, 6, 8, 10, 12]
    assert outcome.passed == 0
    assert {it.timestamp for it in broker.records("in")} == {5_000_000}
    assert run(redrive(broker)).sent.total() == 3, "the rest, behind what is done"


def test_a_rate_is_kept() -> None:
    broker = make_broker()
    for number in range(30):
        bury(broker, number)
    begun = time.monotonic()
    run(redrive(broker, Options(rate=100.0), clock=time.monotonic))
    assert time.monotonic() - begun >= 0.3
    assert sent(broker) == list(range(30))


def test_what_died_again_meanwhile_is_left_for_the_next_time() -> None:
    broker = make_broker()
    for number in range(0, 6, 2):
        bury(broker, number)
    told = []

    async def dying_again() -> Outcome:
        async with broker.admin() as admin, broker.reader() as reader:
            producer = broker.producer()
            await producer.start()

            def on_sent(count: int) -> None:
                told.append(count)
                bury(broker, 100 + 2 * len(told), replays=1)

            return await Redrive(
                admin,
                reader,
                begins=dict.fromkeys(log_ends(broker), 0),
                ends=log_ends(broker),
                group=GROUP,
                options=Options(rate=4.0),
                producer=producer,
                on_sent=on_sent,
                clock=itertools.count(step=1e9).__next__,
            ).run()

    assert run(dying_again()).sent.total() == 3
    assert told == [1, 1, 1]
    assert run(redrive(broker)).sent.total() == 3


def test_an_offset_of_an_earlier_topic_of_the_name_counts_for_nothing() -> None:
    broker = make_broker()
    for number in range(0, 20, 2):
        bury(broker, number)
    run(redrive(broker))
    broker.drop_topic("in.dead")
    broker.create_topic("in.dead", DEAD_PARTITIONS)
    bury(broker, 20)
    assert run(redrive(broker)).sent.total() == 1


def test_a_selection_has_a_group_of_its_own() -> None:
    everything = group_of("app", "in.dead", Selection(), "beginning")
    assert everything == "app.in.dead.redrive"
    others = [
        group_of("app", "in.dead", Selection(causes=("a", "b")), "beginning"),
        group_of("app", "in.dead", Selection(causes=("a",)), "beginning"),
        group_of("app", "in.dead", Selection(), "2h"),
    ]
    assert len({everything, *others}) == 4
    assert all(it.startswith(f"{everything}.") for it in others)
    assert group_of("app", "in.dead", Selection(causes=("b", "a")), "beginning") == others[0]
