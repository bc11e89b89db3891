"""Exactly once, over the in-memory broker with real worker processes: results and offsets together, whatever fails."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable

import pytest

from streamproc.errors import (
    BrokerAuthorizationError,
    BrokerError,
    CommitRejectedError,
    SinkError,
    TransactionAbortedError,
)
from streamproc.records import TopicPartition
from streamproc.testing import MemoryBroker
from tests.integration.test_processor import (
    PARTITIONS,
    all_committed,
    everything,
    make_broker,
    processing,
    put,
    run,
    sources,
)
from tests.support.asyncs import until

EXACTLY_ONCE = {"delivery": "exactly_once", "commit_interval_ms": 10}
GONE = TransactionAbortedError("the transaction is gone")


def visible_and_committed_agree(broker: MemoryBroker) -> bool:
    """Whether every partition has as many results and dead letters as its committed offset says."""
    letters = [
        (int(dict(record.headers)["streamproc-source-partition"] or b""), 0) for record in broker.records("in.dead")
    ]
    visible = Counter(partition for partition, _ in [*sources(broker.records("in.results")), *letters])
    committed = broker.committed("app.main")
    return all(visible[it] == committed.get(TopicPartition("in", it), 0) for it in range(PARTITIONS))


async def watched(broker: MemoryBroker, condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, and look at every change on the way."""

    def look() -> bool:
        assert visible_and_committed_agree(broker)
        return condition()

    await until(look, what)


def committed(broker: MemoryBroker) -> int:
    return sum(broker.committed("app.main").values())


def test_results_dead_letters_and_offsets_become_visible_together() -> None:
    async def test() -> None:
        broker = make_broker()
        put(broker, 300)
        put(broker, 3, start=300, do="refuse")
        async with processing(broker, task=EXACTLY_ONCE):
            await watched(broker, lambda: committed(broker) == 303, "all is committed")
        assert len(broker.records("in.dead")) == 3
        assert sources(broker.records("in.results")) == everything(300)

    run(test)


@pytest.mark.parametrize("operation", ["commit_transaction", "write", "send_batch"])
def test_what_an_aborted_transaction_held_is_processed_again_and_comes_once(operation: str) -> None:
    async def test() -> None:
        broker = make_broker()
        put(broker, 200)
        async with processing(broker, task=EXACTLY_ONCE) as processor:
            broker.fail_next(operation, GONE)  # type: ignore[arg-type]
            await watched(broker, lambda: committed(broker) == 200, "all is committed")
            assert processor.metrics.task("main").transactions_aborted._value.get() == 1
            put(broker, 100, start=200)
            await watched(broker, lambda: committed(broker) == 300, "and what came later too")
        assert sources(broker.records("in.results")) == everything(300)

    run(test)


def test_a_commit_whose_answer_is_lost_is_followed_from_what_the_broker_says() -> None:
    async def test() -> None:
        broker = make_broker()
        put(broker, 100)
        async with processing(broker, task=EXACTLY_ONCE):
            broker.fail_next("commit_answer", TransactionAbortedError("no answer"), times=3)
            await watched(broker, lambda: committed(broker) == 100, "all is committed")
        assert sources(broker.records("in.results")) == everything(100)

    run(test)


def test_without_the_right_to_transactions_the_processor_stops_with_the_reason() -> None:
    async def test() -> None:
        broker = make_broker()
        put(broker, 10)
        with pytest.raises(BrokerAuthorizationError, match="not allowed"):
            async with processing(broker, task=EXACTLY_ONCE) as processor:
                broker.fail_next("commit_transaction", BrokerAuthorizationError("transactions are not allowed"))
                await processor.wait()
        assert broker.records("in.results") == []

    run(test)


def test_a_member_that_was_taken_out_of_its_group_makes_nothing_visible() -> None:
    async def test() -> None:
        broker = make_broker()
        async with processing(broker, task=EXACTLY_ONCE) as zombie:
            put(broker, 30)
            await watched(broker, lambda: committed(broker) == 30, "the first member works")
            with broker.acknowledgements_held():
                put(broker, 60, start=30)
                await until(lambda: zombie.tasks["main"].ledger.in_flight_records > 0, "it has read more")
                async with processing(broker, task=EXACTLY_ONCE):
                    broker.expel(zombie.tasks["main"].consumer)  # type: ignore[arg-type]
                    await broker.settled()
            await watched(broker, lambda: committed(broker) == 90, "all is committed")
        assert sources(broker.records("in.results")) == everything(90)

    run(test)


def test_members_come_and_go_under_load_and_every_result_comes_once() -> None:
    async def test() -> None:
        broker = make_broker()
        async with processing(broker, task=EXACTLY_ONCE):
            for turn in range(4):
                put(broker, 60, start=60 * turn)
                async with processing(broker, task=EXACTLY_ONCE) as other:
                    await watched(broker, lambda turn=turn: committed(broker) > 60 * turn, "it goes on")  # type: ignore[misc]
                    assert other.failure is None
            await watched(broker, lambda: committed(broker) == 240, "all is committed")
        assert sources(broker.records("in.results")) == everything(240)

    run(test)


@pytest.mark.parametrize("seed", range(5))
def test_random_faults_leave_every_result_exactly_once_and_in_order(seed: int) -> None:
    async def test() -> None:
        rng = random.Random(seed)
        broker = make_broker()
        total = 0
        async with processing(broker, task={**EXACTLY_ONCE, "ordering": rng.choice(["key", "partition", "unordered"])}):
            for _ in range(12):
                count = rng.randrange(1, 80)
                put(broker, count, start=total)
                total += count
                broker.fail_next(rng.choice(["commit_transaction", "write", "send_batch"]), GONE)
                if rng.random() < 0.5:
                    some = rng.uniform(0.1, 0.9)
                    await watched(
                        broker,
                        lambda some=some, total=total: committed(broker) >= total * some,  # type: ignore[misc]
                        "some of it is done",
                    )
            await watched(broker, lambda: committed(broker) == total, "all is committed")
        found = sources(broker.records("in.results"))
        assert found == everything(total)

    run(test)


def test_a_span_of_which_only_a_part_was_written_is_not_committed_at_the_end() -> None:
    async def test() -> None:
        broker = make_broker()
        with pytest.raises(SinkError, match=r"in\.results"):
            async with processing(broker, task=EXACTLY_ONCE) as processor:
                # Results and dead letters of one span: the first batch is refused, and the second is taken.
                broker.fail_next("write", BrokerError("the disk is full"))
                put(broker, PARTITIONS)
                put(broker, PARTITIONS, start=PARTITIONS, do="refuse")
                await processor.wait()
        assert visible_and_committed_agree(broker)
        async with processing(broker, task=EXACTLY_ONCE):
            await watched(broker, lambda: committed(broker) == 2 * PARTITIONS, "all is committed")
        assert sources(broker.records("in.results")) == everything(PARTITIONS)

    run(test)


def test_metrics_records_of_an_aborted_transaction_do_not_come_with_the_next() -> None:
    async def test() -> None:
        broker = make_broker()
        put(broker, 20)
        # Nothing but an abort comes between the batches' reports and their being sent.
        slow = {**EXACTLY_ONCE, "commit_interval_ms": 4_000}
        async with processing(broker, task=slow) as processor:
            broker.fail_next("write", GONE)
            await until(lambda: processor.metrics.task("main").transactions_aborted._value.get() == 1, "it is aborted")
            ledger = processor.tasks["main"].ledger
            await until(lambda: sum(ledger.committable().values()) == 20, "all is written again")
        told = [json.loads(record.value or b"") for record in broker.records("app.metrics")]
        assert sum(it["records"] for it in told) == 20
        assert sources(broker.records("in.results")) == everything(20)

    run(test)


def test_nothing_is_read_in_vain_while_a_transaction_is_being_given_up() -> None:
    async def test() -> None:
        broker = make_broker()
        put(broker, 30)
        async with processing(broker, task=EXACTLY_ONCE, kafka={"session_timeout_ms": 1_000}) as processor:
            await watched(broker, lambda: committed(broker) == 30, "the first records are done")
            task = processor.tasks["main"]
            # The group tells of nothing, so that the recovery waits for a session.
            broker.fail_next("commit_transaction", CommitRejectedError("the group has moved on"))
            put(broker, 30, start=30)
            await until(lambda: processor.metrics.task("main").transactions_aborted._value.get() == 1, "it is aborted")
            before = [task.consumer.position(TopicPartition("in", it)) for it in range(PARTITIONS)]
            put(broker, 300, start=60)
            while not task.ledger.leases():
                assert [task.consumer.position(TopicPartition("in", it)) for it in range(PARTITIONS)] in (
                    before,
                    [broker.committed("app.main")[TopicPartition("in", it)] for it in range(PARTITIONS)],
                )
                await asyncio.sleep(0)
            await watched(broker, lambda: committed(broker) == 360, "all is committed")
        assert sources(broker.records("in.results")) == everything(360)

    run(test)


def test_shutdown_commits_what_is_finished_and_a_restart_goes_on_from_there() -> None:
    async def test() -> None:
        broker = make_broker()
        put(broker, 500)
        async with processing(broker, task=EXACTLY_ONCE):
            await watched(broker, lambda: committed(broker) > 20, "it has begun")
        assert visible_and_committed_agree(broker)
        async with processing(broker, task=EXACTLY_ONCE):
            await all_committed(broker, 500)
        assert sources(broker.records("in.results")) == everything(500)

    run(test)
