"""Runs the statistics as a process: topics, signals, HTTP, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping

import uvloop

from streamproc.broker.admin import KafkaAdmin
from streamproc.broker.connection import check_group, first_connection, probe
from streamproc.broker.interface import Admin, NewTopic, TopicInfo
from streamproc.broker.reader import KafkaReader
from streamproc.errors import StatsError, TopicMissingError
from streamproc.observe.logs import configure_logging
from streamproc.observe.server import Sidecar
from streamproc.records import TopicPartition
from streamproc.settings import Settings
from streamproc.stats.app import StatsApp
from streamproc.stats.http import create_app

STOP_WITHIN_S = 15.0
LOOK_MS = 500
"""So long a look at the changelogs may take; what is not allowed is said at once."""
_QUIET = ("faust", "mode")

log = logging.getLogger(__name__)


def run_stats(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT, then commit and answer the exit code; a second signal exits at once.

    Raises:
        StreamprocError: what kept it from starting, or ended it.
    """
    configure_logging(sys.stderr, **settings.logging.model_dump())
    for name in _QUIET:
        # They log what they do at every step; what ends them is raised, and said in one sentence.
        logging.getLogger(name).setLevel(logging.DEBUG if settings.logging.level == "debug" else logging.CRITICAL)
    return uvloop.run(_run(settings))


async def _run(settings: Settings) -> int:
    asked = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if asked.is_set():
            sys.stderr.flush()
            os._exit(128 + number)
        log.info("%s: stopping; once more to exit at once", number.name)
        asked.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    stopping = loop.create_task(asked.wait())
    serving = loop.create_task(_serve(settings))
    await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    return 0


async def _serve(settings: Settings) -> None:
    embedded = (await probe(settings.kafka)).embedded
    partitions = await prepare(settings)
    app = StatsApp(settings, partitions, embedded=embedded)
    sidecar = Sidecar(create_app(app), settings.stats.host, settings.stats.port, section="stats")
    try:
        await sidecar.start()
        await app.run()
    finally:
        try:
            async with asyncio.timeout(STOP_WITHIN_S):
                await app.stop()
        except TimeoutError:
            log.warning("it did not stop within %g s; nothing that is counted is lost", STOP_WITHIN_S)
        await sidecar.stop()


async def prepare(settings: Settings) -> Mapping[str, int]:
    """The metrics topics and their partitions, once all is there that they need, and may be read.

    What is not allowed is found here, as far as it can be: Faust would try again for ever.
    """
    client_id = f"{settings.name}-stats"
    async with KafkaAdmin(settings.kafka, client_id=client_id) as admin:
        partitions = await make_topics(settings, admin)
    async with first_connection(settings.kafka, client_id) as connection:
        await check_group(connection, settings.stats_group, settings.kafka)
    async with KafkaReader(settings.kafka, client_id=client_id) as reader:
        topics = [changelog_of(settings, topic) for topic in partitions]
        reader.assign({TopicPartition(topic, 0): 0 for topic in topics})
        await reader.getmany(timeout_ms=LOOK_MS)
    return partitions


async def make_topics(settings: Settings, admin: Admin) -> Mapping[str, int]:
    """The metrics topics and their partitions; their changelogs and the stats topic are made where there are none.

    Raises:
        TopicMissingError: a metrics topic does not exist.
        StatsError: a changelog does not go with its topic.
    """
    found = await admin.topics()
    metrics = list(dict.fromkeys(settings.topics_of(task).metrics for task in settings.tasks))
    if absent := [topic for topic in metrics if topic not in found]:
        with contextlib.suppress(TopicMissingError):
            await admin.check_topics(absent, "Read")  # they may be hidden from us
        raise TopicMissingError(
            f"metrics topic {', '.join(absent)} does not exist; create it with `streamproc topics apply`, or start the "
            "processor first",
            topics=absent,
        )
    new: list[NewTopic] = []
    for topic in metrics:
        changelog, count = changelog_of(settings, topic), found[topic].partitions
        if changelog not in found:
            # Small segments, so that what was replaced is cleared away soon: a restart reads what is left.
            configs = {"cleanup.policy": "compact", "segment.ms": "3600000", "min.cleanable.dirty.ratio": "0.1"}
            new.append(NewTopic(changelog, count, _replication(found[topic]), configs))
        elif found[changelog].partitions < count:
            await admin.add_partitions(changelog, count)
        elif found[changelog].partitions > count:
            raise StatsError(
                f"topic {topic} has {count} partitions, and its changelog {changelog} has "
                f"{found[changelog].partitions}: the topic was made anew; delete the changelog to begin anew too"
            )
    if settings.stats_topic not in found:
        new.append(NewTopic(settings.stats_topic, 1, _replication(found[metrics[0]])))
    await admin.create_topics(new)
    await admin.check_topics([changelog_of(settings, topic) for topic in metrics], "Read")
    await admin.check_topics([settings.stats_topic], "Write")
    if new:
        log.info("created %s", ", ".join(it.name for it in new))
    return {topic: found[topic].partitions for topic in metrics}


def changelog_of(settings: Settings, topic: str) -> str:
    """The changelog of a metrics topic's table, as Faust names it."""
    return f"{settings.stats_group}-{topic}-changelog"


def _replication(like: TopicInfo) -> int:
    return like.replication or -1
