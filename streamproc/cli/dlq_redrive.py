"""``streamproc dlq redrive``: a selection of dead letters, sent back to the topics that their records came from."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from streamproc.cli.dlq_topics import CLIENT_ID, FromOption, chosen_topic, clients, place_text
from streamproc.cli.kafka_options import BootstrapOption, find_settings, run_async
from streamproc.cli.positions import Where, offsets_of, parse_where, partitions_of
from streamproc.cli.terminal import ConfigOption, JsonOption, Progress, ask, count_of, print_json, print_table, say
from streamproc.errors import BrokerAuthorizationError, StreamprocError
from streamproc.records import TopicPartition

if TYPE_CHECKING:
    from streamproc.broker.interface import Admin, Producer
    from streamproc.replay.redrive import Options, Outcome, Redrive
    from streamproc.settings import KafkaSettings

_MAX_REPLAYS = 3


def redrive(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[TASK|TOPIC]", help="A task, or a dead-letter topic; may be left out if there is one."),
    ] = None,
    *,
    task: Annotated[list[str] | None, typer.Option(metavar="TASK", help="Letters of this task.")] = None,
    cause: Annotated[list[str] | None, typer.Option(metavar="CAUSE", help="Letters of this cause.")] = None,
    error_type: Annotated[list[str] | None, typer.Option(metavar="TYPE", help="Letters of this error type.")] = None,
    fault: Annotated[
        list[str] | None, typer.Option(metavar="FAULT", help="Letters of this fault, as `dlq list` names it.")
    ] = None,
    message: Annotated[
        str, typer.Option(metavar="TEXT", help="Letters whose message has this text; /…/ is a regular expression.")
    ] = "",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE", help="Letters whose value has this in a field (a.b: nested)."),
    ] = None,
    replayed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Letters that were sent back so often already.")
    ] = None,
    begin: FromOption = "beginning",
    end: Annotated[str, typer.Option("--to", metavar="WHERE", help="Where to end, before it; as --from.")] = "end",
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Send so many at most.")] = None,
    rate: Annotated[float | None, typer.Option(metavar="N", help="Send at most N records a second.")] = None,
    max_replays: Annotated[
        int, typer.Option(metavar="N", min=1, help="Skip letters that were sent back so often already.")
    ] = _MAX_REPLAYS,
    timestamps: Annotated[
        Literal["keep", "now"], typer.Option(help="Those that the records had, or the time of writing.")
    ] = "keep",
    group: Annotated[
        str | None,
        typer.Option(
            metavar="GROUP", help="Keep the progress in this consumer group.", show_default="one for each selection"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go where; send nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: ConfigOption = None,
    bootstrap_servers: BootstrapOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send dead letters back to the topics and partitions that their records came from; ask first, on a terminal.

    Options that choose letters go together; one that is given several times takes any of its values.

    Interrupted, the same command goes on where it stopped: nothing is sent twice, nothing is missed.

    Letters that are selected and cannot be sent are told, with exit code 1.
    """
    if rate is not None and rate <= 0:
        raise typer.BadParameter("--rate must be above 0")
    now = time.time()
    begin_at, end_at = parse_where(begin, now, "--from"), parse_where(end, now, "--to")
    settings, kafka = find_settings(config, bootstrap_servers)
    place = chosen_topic(settings, name)

    from streamproc.replay.dead_letters import Selection  # noqa: PLC0415 - --help needs none of it
    from streamproc.replay.redrive import Options, group_of  # noqa: PLC0415 - as above

    selection = Selection(
        tasks=tuple(task or place.tasks),
        causes=tuple(cause or ()),
        error_types=tuple(error_type or ()),
        faults=tuple(fault or ()),
        message=message,
        where=tuple(map(_field, where or ())),
        replays=replayed,
    )
    application = settings.name if settings is not None else "streamproc"
    what = _What(
        kafka,
        place.topic,
        group or group_of(application, place.topic, selection, begin),
        Options(selection, limit, rate, max_replays, keep_timestamps=timestamps == "keep"),
        begin_at,
        end_at,
        warn=yes,
    )
    if dry_run or not yes:
        outcome = run_async(lambda: _look(what))
        if not as_json:
            _show_plan(outcome)
        if dry_run:
            _tell(outcome, what, "would be sent")
            if as_json:
                print_json(_outcome_as_json(outcome, what, dry_run=True, delivery=None))
            return
        if not outcome.sent:
            _tell(outcome, what, "to be sent")
            _complain(outcome, what)
            return
        ask(f"Send {count_of(outcome.sent.total(), 'dead letter')} of {what.topic} back?", "nothing was sent")
    _send(what, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _What:
    kafka: KafkaSettings
    topic: str
    group: str
    options: Options
    begin: Where
    end: Where
    warn: bool
    """Whether there was no look before the sending, which has warned already."""


def _send(what: _What, *, as_json: bool) -> None:
    progress = Progress("sent back")
    running = _Running()
    interrupted = False
    try:
        run_async(lambda: _redrive(what, progress, running))
        progress.finish()
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        if running.redrive is not None:
            outcome = running.redrive.outcome
            if as_json:
                print_json(_outcome_as_json(outcome, what, dry_run=False, delivery=running.delivery))
            _tell(outcome, what, "sent back, and interrupted; the same command goes on" if interrupted else "sent back")
    _complain(running.outcome, what)


@dataclass(slots=True)
class _Running:
    """What is known of a redrive while it runs."""

    redrive: Redrive | None = None
    delivery: str = ""

    @property
    def outcome(self) -> Outcome:
        if self.redrive is None:
            raise AssertionError("it has not begun")
        return self.redrive.outcome


async def _look(what: _What) -> Outcome:
    from streamproc.replay.redrive import Redrive  # noqa: PLC0415 - --help needs none of it

    async with clients(what.kafka) as (admin, reader):
        begins, ends = await _bounds(admin, what)
        it = Redrive(admin, reader, begins=begins, ends=ends, group=what.group, options=what.options)
        await it.run()
        await _warn_of_retention(admin, it.outcome, what)
        return it.outcome


async def _warn_of_retention(admin: Admin, outcome: Outcome, what: _What) -> None:
    """Say so where Kafka would delete what is sent back, since it is too old by its own timestamp."""
    for topic, oldest_ms in outcome.oldest_ms.items() if what.options.keep_timestamps else ():
        try:
            entry = (await admin.describe_configs(topic)).get("retention.ms")
        except BrokerAuthorizationError as error:
            say(f"warning: whether Kafka keeps what is sent back is not known: {error}")
            continue
        kept_ms = int(entry.value) if entry is not None and entry.value else -1
        if 0 <= kept_ms < time.time() * 1_000 - oldest_ms:
            say(
                f"warning: topic {topic} keeps records for {kept_ms / 86_400_000:g} days (retention.ms), and some are "
                f"older: Kafka may delete them before they are processed; --timestamps now keeps them"
            )


async def _bounds(admin: Admin, what: _What) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
    """Where to begin and where to end in each partition of the dead-letter topic."""
    partitions = await partitions_of(admin, [what.topic])
    ends = await admin.end_offsets(partitions)
    begins = await offsets_of(what.begin, admin, partitions, ends)
    return begins, await offsets_of(what.end, admin, partitions, ends)


async def _redrive(what: _What, progress: Progress, running: _Running) -> None:
    from streamproc.broker.connections import KafkaConnections  # noqa: PLC0415 - --help needs no Kafka client
    from streamproc.broker.transactional_producer import has_transactions  # noqa: PLC0415 - as above
    from streamproc.replay.redrive import CHUNK_RECORDS, Redrive  # noqa: PLC0415 - as above

    # That the embedded broker has no idempotent producers is known, and no news here.
    logging.getLogger("streamproc.broker.producer").setLevel(logging.ERROR)
    connections = KafkaConnections(what.kafka)
    async with clients(what.kafka) as (admin, reader):
        begins, ends = await _bounds(admin, what)
        one = partial(
            Redrive,
            admin,
            reader,
            begins=begins,
            ends=ends,
            group=what.group,
            options=what.options,
            on_sent=progress.add,
        )
        producer: Producer
        if await has_transactions(what.kafka, CLIENT_ID):
            running.delivery = "exactly_once"
            producer = transactions = connections.transactional_producer(
                client_id=CLIENT_ID, compression="none", transactional_id=what.group
            )
            running.redrive = one(transactions=transactions)
        else:
            running.delivery = "at_least_once"
            say(f"the broker has no transactions: if this is killed, up to {CHUNK_RECORDS} records may come twice")
            producer = connections.producer(client_id=CLIENT_ID, compression="none")
            running.redrive = one(producer=producer)
        await producer.start()
        try:
            await running.redrive.run()
            if what.warn:
                await _warn_of_retention(admin, running.redrive.outcome, what)
        finally:
            await producer.stop()


_WHY = {
    "replayed_too_often": "were sent back as often as --max-replays allows (choose them with --replayed, and raise it)",
    "cut": "were cut, as the dead-letter topic takes no larger ones, and are not the records any more",
    "too_large": "are larger than their input topic takes now",
    "no_dead_letter": "are no dead letters of streamproc's",
}


def _show_plan(outcome: Outcome) -> None:
    rows = [(to.topic, to.partition, f"{count:,}") for to, count in sorted(outcome.sent.items())]
    if rows:
        print_table(("to topic", "partition", "letters"), rows, right=("partition", "letters"), whole=("to topic",))


def _tell(outcome: Outcome, what: _What, done: str) -> None:
    selected = outcome.sent.total() + outcome.skipped.total()
    looked_at = selected + outcome.passed
    sent = count_of(outcome.sent.total(), "dead letter")
    say(f"{sent} {done}; {looked_at:,} were looked at, {selected:,} selected; progress: consumer group {what.group}")
    for reason, count in outcome.skipped.items():
        say(f"skipped: {count:,} {_WHY[reason]}: {_examples(outcome, reason)}")


def _complain(outcome: Outcome, what: _What) -> None:
    """End with a failure where something was selected that cannot be sent."""
    left = sum(count for reason, count in outcome.skipped.items() if reason != "no_dead_letter")
    if left:
        raise StreamprocError(
            f"{count_of(left, 'selected dead letter')} of {what.topic} cannot be sent back, see above"
        )


def _examples(outcome: Outcome, reason: Any) -> str:
    shown = [place_text(it) for it in outcome.examples[reason]]
    return ", ".join(shown) + (", …" if outcome.skipped[reason] > len(shown) else "")


def _outcome_as_json(outcome: Outcome, what: _What, *, dry_run: bool, delivery: str | None) -> dict[str, Any]:
    return {
        "topic": what.topic,
        "group": what.group,
        "selection": what.options.selection.described(),
        "dry_run": dry_run,
        "delivery": delivery,
        "sent": outcome.sent.total(),
        "to": [{**to._asdict(), "records": count} for to, count in sorted(outcome.sent.items())],
        "skipped": {
            str(reason): {"records": count, "examples": [it._asdict() for it in outcome.examples[reason]]}
            for reason, count in outcome.skipped.items()
        },
        "not_selected": outcome.passed,
    }


def _field(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"--where {text} is no FIELD=VALUE")
    return name, value
