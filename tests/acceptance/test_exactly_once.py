"""Exactly once on Kafka, as a reader of committed records sees it: zombies, deaths, and readers that came too early."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_streams import PARTITIONS, Stream
from tests.support.app import App, read_to_end, source
from tests.support.asyncs import wait_until

Names = Callable[..., str]
SESSION_MS = 6_000


def stream_of(kafka: str, name: str, commit_interval_ms: int = 100, **task: Any) -> Stream:
    stream = Stream(kafka, name, "Identity", delivery="exactly_once", commit_interval_ms=commit_interval_ms, **task)
    stream.settings["kafka"]["session_timeout_ms"] = SESSION_MS
    stream.settings["pool"]["workers"] = 1
    return stream


def numbered(count: int, first: int = 0) -> list[bytes | None]:
    return [b'{"id": %d}' % index for index in range(first, first + count)]


def partitions_of(status: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = status["tasks"]["main"]["partitions"]
    return found


def open_results(status: dict[str, Any]) -> int:
    """Results that were written into a transaction that is not committed yet; each partition began at 0."""
    written: int = status["tasks"]["main"]["counts"]["out"]
    return written - sum(it["committed"] or 0 for it in partitions_of(status))


def test_results_are_visible_once_with_their_offsets(kafka: str, tmp_path: Path, topic_name: Names) -> None:
    stream = stream_of(kafka, topic_name(), batch={"max_size": 512})
    count = 50_000
    stream.produce(numbered(count))
    with App(tmp_path, stream.settings) as app:
        app.until_ready()
        app.until(lambda _: sum(stream.committed().values()) == count, "everything is committed")
        assert sum(it["results"] for it in stream.metrics()) == count
        assert app.metric("streamproc_transactions_aborted_total") == 0
        assert app.terminate() == 0
    stream.check_complete()


def test_a_zombie_that_wakes_after_its_partitions_moved_makes_nothing_visible_and_rejoins(
    kafka: str, tmp_path: Path, topic_name: Names
) -> None:
    # Transactions stay open for long, so that the zombie has one when it is stopped.
    stream = stream_of(kafka, topic_name(), commit_interval_ms=4_000)
    with App(tmp_path / "zombie", stream.settings) as zombie:
        zombie.until_ready()

        def in_a_transaction(status: dict[str, Any]) -> bool:
            if not open_results(status):
                stream.produce(numbered(600))
            return open_results(status) > 0

        zombie.until(in_a_transaction, "its results are in an open transaction")
        zombie.process.send_signal(signal.SIGSTOP)
        with App(tmp_path / "heir", stream.settings) as heir:
            heir.until(lambda status: len(partitions_of(status)) == PARTITIONS, "the heir has all partitions")
            stream.produce(numbered(600))
            heir.until(lambda _: stream.committed() == stream.ends(), "the heir has done everything")
            zombie.process.send_signal(signal.SIGCONT)
            zombie.until(lambda status: len(partitions_of(status)) == PARTITIONS // 2, "the zombie has rejoined")
            stream.produce(numbered(600))
            heir.until(lambda _: stream.committed() == stream.ends(), "both work on")
            assert zombie.terminate() == 0
            assert heir.terminate() == 0
    visible = Counter(source(it) for it in stream.results())
    assert visible == Counter((p, o) for p, end in stream.ends().items() for o in range(end))
    everything = read_to_end(kafka, f"{stream.topic}.results", PARTITIONS, uncommitted=True)
    assert len(everything) > len(visible), "the zombie's records are in the log, and nobody sees them"


def test_replicas_that_are_killed_in_the_middle_of_transactions_leave_each_result_once(
    kafka: str, tmp_path: Path, topic_name: Names
) -> None:
    stream = stream_of(kafka, topic_name(), commit_interval_ms=1_000, batch={"max_size": 64})
    count = 0
    with App(tmp_path / "survivor", stream.settings) as survivor:
        survivor.until_ready()
        for turn in range(2):
            with App(tmp_path / f"victim{turn}", stream.settings) as victim:
                victim.until(lambda status: len(partitions_of(status)) == PARTITIONS // 2, "half of the partitions")
                stream.produce(numbered(6_000, first=count))
                count += 6_000
                # With a second between commits there is hardly a moment without an open transaction.
                victim.until(lambda status: status["tasks"]["main"]["counts"]["out"] > 0, "it writes results")
                victim.process.kill()
                victim.process.wait()
            survivor.until(lambda _: sum(stream.committed().values()) == count, "the survivor takes over")  # noqa: B023
        assert survivor.terminate() == 0
    # What comes after a dead replica's transaction is visible once Kafka has given that up.
    wait_until(lambda: len(stream.results()) >= count, "everything is visible", deadline_s=60)
    visible = Counter(source(it) for it in stream.results())
    assert visible == Counter((p, o) for p, end in stream.ends().items() for o in range(end))


@pytest.mark.embedded
def test_a_broker_without_transactions_is_refused_with_what_to_do(
    embedded_broker: str, tmp_path: Path, topic_name: Names
) -> None:
    stream = stream_of(embedded_broker, topic_name())
    with App(tmp_path, stream.settings) as app:
        assert app.process.wait(30) == 2
        assert "needs transactions" in app.log()
        assert "at_least_once" in app.log()
