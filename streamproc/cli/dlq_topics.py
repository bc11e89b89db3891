"""What the commands of ``streamproc dlq`` share: which dead-letter topics are meant, and the clients to read them."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from streamproc.cli.kafka_options import connected
from streamproc.cli.positions import WHERE_HELP
from streamproc.cli.terminal import UsageError

if TYPE_CHECKING:
    from streamproc.broker.interface import Admin, Reader
    from streamproc.replay.marks import Source
    from streamproc.settings import KafkaSettings, Settings

CLIENT_ID = "streamproc-dlq"

FromOption = Annotated[
    str,
    typer.Option(
        "--from",
        metavar="WHERE",
        help=f"{WHERE_HELP}.",
    ),
]


@dataclass(frozen=True, slots=True)
class ChosenTopic:
    """A dead-letter topic; of the tasks that write to it those that are meant, none for all."""

    topic: str
    tasks: tuple[str, ...] = ()


def chosen_topics(settings: Settings | None, names: Sequence[str]) -> list[ChosenTopic]:
    """The topics that are meant by names of tasks and topics; without names those of all tasks. Raises UsageError."""
    writers: defaultdict[str, list[str]] = defaultdict(list)
    if settings is not None:
        for name in settings.tasks:
            writers[settings.topics_of(name).dead].append(name)
    if not names:
        if settings is None:
            raise UsageError("say which dead-letter topic; without a settings file no task is known")
        return [ChosenTopic(topic) for topic in writers]
    chosen: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        topic = name
        if settings is not None and name in settings.tasks:
            topic = settings.topics_of(name).dead
            chosen[topic].add(name)
        else:
            chosen[topic].update(writers[topic])
    # All who write there are no choice: without one, what was written under another task's name is seen too.
    return [
        ChosenTopic(topic, () if them >= set(writers[topic]) else tuple(sorted(them))) for topic, them in chosen.items()
    ]


def chosen_topic(settings: Settings | None, name: str | None) -> ChosenTopic:
    """The one topic that is meant. Raises UsageError where it may be several."""
    places = chosen_topics(settings, [name] if name else [])
    if len(places) > 1:
        raise UsageError(f"say which dead letters: {', '.join(it.topic for it in places)}, or the name of a task")
    return places[0]


@contextlib.asynccontextmanager
async def clients(kafka: KafkaSettings) -> AsyncIterator[tuple[Admin, Reader]]:
    """What dead letters are read with. Raises BrokerError."""
    from streamproc.broker.admin import KafkaAdmin  # noqa: PLC0415 - --help needs no Kafka client
    from streamproc.broker.reader import KafkaReader  # noqa: PLC0415 - as above

    async with (
        connected(KafkaAdmin(kafka, client_id=CLIENT_ID), kafka) as admin,
        KafkaReader(kafka, client_id=CLIENT_ID) as reader,
    ):
        yield admin, reader


def place_text(it: Source | None) -> str:
    """A record's place, as the commands take and show it."""
    return "" if it is None else f"{it.topic}:{it.partition}:{it.offset}"
