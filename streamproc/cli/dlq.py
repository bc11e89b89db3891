"""``streamproc dlq``: dead letters by fault, and one in full; ``redrive`` is in ``dlq_redrive``."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from streamproc.cli.dlq_redrive import redrive
from streamproc.cli.dlq_topics import ChosenTopic, FromOption, chosen_topics, clients, place_text
from streamproc.cli.kafka_options import BootstrapOption, find_settings, run_async
from streamproc.cli.positions import Where, offsets_of, parse_where, partitions_of
from streamproc.cli.terminal import ConfigOption, JsonOption, UsageError, count_of, print_json, print_table, say
from streamproc.errors import StreamprocError
from streamproc.record_lines import write_value
from streamproc.records import TopicPartition, TopicRecord

if TYPE_CHECKING:
    from streamproc.broker.interface import Admin, Reader
    from streamproc.replay.dead_letters import Faults, Letter
    from streamproc.replay.marks import Source
    from streamproc.settings import KafkaSettings

app = typer.Typer(no_args_is_help=True)

_HEX_WIDTH = 16
_HEX_BYTES = 1_024


@app.callback(epilog="Example: streamproc dlq list")
def dlq() -> None:
    """Look into dead-letter topics, and send letters back to the topics that their records came from.

    `list` groups them by fault, `show` tells everything about one, `redrive` sends a selection back.
    """


# -- list


@app.command("list", epilog="Example: streamproc dlq list text --from 1d")
def list_(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TASK|TOPIC]...", help="Tasks, or dead-letter topics; those of all tasks by default."),
    ] = None,
    *,
    begin: FromOption = "beginning",
    config: ConfigOption = None,
    bootstrap_servers: BootstrapOption = None,
    as_json: JsonOption = False,
) -> None:
    """Group dead letters by fault: task, cause, stage, error type, and the message without what differs.

    Times are those of the records that failed. A fault's name can be given to `redrive --fault`, an example's place to
    `show`.
    """
    where = parse_where(begin, time.time(), "--from")
    settings, kafka = find_settings(config, bootstrap_servers)
    places = chosen_topics(settings, names or [])
    faults = run_async(lambda: _list(kafka, places, where))
    if as_json:
        print_json(_faults_as_json(faults))
    else:
        _show_faults(faults, [it.topic for it in places])


async def _list(kafka: KafkaSettings, places: Sequence[ChosenTopic], where: Where) -> Faults:
    from streamproc.replay.dead_letters import Faults, read_letter  # noqa: PLC0415 - --help needs none of it

    faults = Faults()
    tasks = {it.topic: it.tasks for it in places}
    async with clients(kafka) as (admin, reader):
        async for record in _records(admin, reader, await partitions_of(admin, list(tasks)), where):
            letter = read_letter(record)
            if letter is None:
                faults.foreign += 1
            elif not tasks[record.topic] or letter.task in tasks[record.topic]:
                faults.add(letter)
    return faults


def _faults_as_json(faults: Faults) -> dict[str, Any]:
    return {
        "letters": faults.count,
        "faults": [
            {
                "fault": fault.id,
                **fault._asdict(),
                "count": tally.count,
                "first": _time(tally.first_ms),
                "last": _time(tally.last_ms),
                "example": None if tally.example is None else tally.example._asdict(),
                "example_message": tally.example_message,
            }
            for fault, tally in faults.most_first()
        ],
        "others": faults.others.count,
        "no_dead_letters": faults.foreign,
    }


def _show_faults(faults: Faults, topics: Sequence[str]) -> None:
    rows = [
        (
            fault.id,
            f"{tally.count:,}",
            fault.task,
            fault.cause,
            fault.stage,
            fault.error_type,
            fault.message,
            _time(tally.first_ms),
            _time(tally.last_ms),
            place_text(tally.example),
        )
        for fault, tally in faults.most_first()
    ]
    columns = ("fault", "letters", "task", "cause", "stage", "error", "message", "first", "last", "example")
    if rows:
        whole = ("fault", "letters", "cause", "task", "example")
        print_table(columns, rows, right=("letters",), whole=whole, spare=("first", "stage", "last"))
    found = f"{count_of(faults.count, 'dead letter')} in {', '.join(topics)}"
    of = f", of {count_of(len(rows), 'fault')}" if rows else ""
    others = (
        f"; {faults.others.count:,} of them are of further faults, which are not shown" if faults.others.count else ""
    )
    foreign = f"; {count_of(faults.foreign, 'record')} beside them that are no dead letters" if faults.foreign else ""
    say(f"{found}{of}{others}{foreign}")


# -- show


@app.command(
    epilog="Example: streamproc dlq show sentiment.text.dead:0:17\n\n"
    "Example: streamproc dlq show --source sentiment.text:0:4711"
)
def show(
    place: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TOPIC:PARTITION:OFFSET]", help="Where the letter is; blanks will do for the colons."),
    ] = None,
    *,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="TOPIC:PARTITION:OFFSET",
            help="Look for the letter of this input record instead; the argument may then name a task or topic.",
        ),
    ] = None,
    config: ConfigOption = None,
    bootstrap_servers: BootstrapOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one dead letter: why it failed, its headers, the traceback, the value, and what was cut.

    With --source the dead-letter topics are searched from their beginning; of several letters the last one is shown.
    """
    settings, kafka = find_settings(config, bootstrap_servers)
    if source is not None:
        wanted, places = _parse_place([source], "--source"), chosen_topics(settings, place or [])
        letter = run_async(lambda: _find(kafka, [it.topic for it in places], wanted))
    else:
        at = _parse_place(place or [], "the place")
        letter = run_async(lambda: _fetch(kafka, at))
    if as_json:
        print_json(_letter_as_json(letter))
    else:
        _show_letter(letter)


def _parse_place(parts: Sequence[str], what: str) -> Source:
    from streamproc.replay.marks import Source  # noqa: PLC0415 - --help needs none of it

    words = [word for part in parts for word in part.split(":")]
    if len(words) != 3 or not (words[1].isdecimal() and words[2].isdecimal()):
        raise UsageError(f"{what} is {' '.join(parts) or 'missing'}; write it as TOPIC:PARTITION:OFFSET")
    return Source(words[0], int(words[1]), int(words[2]))


async def _fetch(kafka: KafkaSettings, at: Source) -> Letter:
    from streamproc.replay.dead_letters import read_letter  # noqa: PLC0415 - --help needs none of it

    partition = TopicPartition(at.topic, at.partition)
    async with clients(kafka) as (admin, reader):
        if partition not in (there := await partitions_of(admin, [at.topic])):
            raise UsageError(f"topic {at.topic} has no partition {at.partition}; it has {len(there)}, from 0 on")
        begin = (await admin.begin_offsets([partition]))[partition]
        end = (await admin.end_offsets([partition]))[partition]
        record = None
        if begin <= at.offset < end:
            from streamproc.broker.read_between import read_between  # noqa: PLC0415 - as above

            async for found in read_between(reader, {partition: at.offset}, {partition: at.offset + 1}):
                record = next(iter(found[partition]), None)
    if record is None:
        raise StreamprocError(
            f"there is no record at {place_text(at)}; partition {at.partition} has offsets {begin} to {end - 1}"
            if begin < end
            else f"there is no record at {place_text(at)}; partition {at.partition} is empty"
        )
    letter = read_letter(record)
    if letter is None:
        raise StreamprocError(f"the record at {place_text(at)} is no dead letter; `streamproc consume` shows it")
    return letter


async def _find(kafka: KafkaSettings, topics: Sequence[str], source: Source) -> Letter:
    from streamproc.replay.dead_letters import read_letter  # noqa: PLC0415 - --help needs none of it

    found: Letter | None = None
    async with clients(kafka) as (admin, reader):
        async for record in _records(admin, reader, await partitions_of(admin, topics), Where()):
            letter = read_letter(record)
            if letter is not None and letter.source == source:
                found = letter
    if found is None:
        raise StreamprocError(f"there is no dead letter of {place_text(source)} in {', '.join(topics)}")
    return found


def _letter_as_json(letter: Letter) -> dict[str, Any]:
    record = letter.record
    return {
        **letter.place._asdict(),
        "timestamp": record.timestamp,
        "source": letter.source._asdict(),
        "fault": letter.fault.id,
        "task": letter.task,
        "cause": letter.cause,
        "stage": letter.stage,
        "error_type": letter.error_type,
        "error_message": letter.message,
        "attempts": letter.attempts,
        "worker": letter.worker,
        "replays": letter.replays,
        "cut": dict(letter.cut),
        "traceback": letter.traceback,
        "key": None if record.key is None else _text(record.key),
        "headers": [[name, None if value is None else _text(value)] for name, value in letter.headers],
        "value": orjson.Fragment(write_value(record)),
    }


def _show_letter(letter: Letter) -> None:
    record = letter.record
    facts = [
        ("letter", place_text(letter.place)),
        ("of record", f"{place_text(letter.source)}, of {_time(record.timestamp)}"),
        ("fault", letter.fault.id),
        ("task", letter.task),
        ("cause", f"{letter.cause}, in {letter.stage}"),
        ("error", letter.error_type),
        ("message", letter.message),
        ("attempts", letter.attempts),
        ("worker", letter.worker),
        ("sent back", count_of(letter.replays, "time")),
        ("key", "none" if record.key is None else _text(record.key)),
        *[(f"header {name}", "none" if value is None else _text(value)) for name, value in letter.headers],
        *[("cut", _CUT[part].format(told)) for part, told in letter.cut.items()],
    ]
    print_table(("", ""), [(name, _printable(told)) for name, told in facts])
    for title, lines in (("traceback", letter.traceback), ("value", _value(record.value))):
        if lines:
            typer.echo(f"\n{title}\n{lines}")


_CUT = {
    "value": "the value, which had {} bytes; the letter cannot be sent back",
    "headers": "the record's {} headers; the letter cannot be sent back",
    "key": "the key, which had {} bytes; the letter cannot be sent back",
}


def _value(value: bytes | None) -> str:
    """A value for people: JSON indented, other text as it is, other bytes in hexadecimal."""
    if value is None:
        return "none: the record is a tombstone"
    try:
        text = value.decode()
    except UnicodeDecodeError:
        shown = value[:_HEX_BYTES]
        rows = [shown[first : first + _HEX_WIDTH] for first in range(0, len(shown), _HEX_WIDTH)]
        lines = [
            f"{number * _HEX_WIDTH:08x}  {row.hex(' '):<{3 * _HEX_WIDTH}} "
            + "".join(chr(it) if 32 <= it < 127 else "." for it in row)
            for number, row in enumerate(rows)
        ]
        more = f"\n… {len(value):,} bytes in all; --json has them as base64" if len(value) > _HEX_BYTES else ""
        return "\n".join(lines) + more
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except ValueError:
        return _printable(text)


app.command(
    epilog="Example: streamproc dlq redrive text --cause exception --dry-run\n\n"
    "Example: streamproc dlq redrive text --fault 3fa9c1d2 --rate 100 --yes"
)(redrive)


async def _records(
    admin: Admin, reader: Reader, partitions: Sequence[TopicPartition], where: Where
) -> AsyncIterator[TopicRecord]:
    """What partitions hold from some place on up to their ends of now."""
    from streamproc.broker.read_between import read_between  # noqa: PLC0415 - --help needs none of it

    ends = await admin.end_offsets(partitions)
    async for found in read_between(reader, await offsets_of(where, admin, partitions, ends), ends):
        for records in found.values():
            for record in records:
                yield record


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _text(value: bytes) -> str:
    """Text as it is, other bytes in hexadecimal."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return f"0x{value.hex()}"


def _printable(text: str) -> str:
    """Text that does nothing to a terminal: escapes in place of what cannot be printed."""
    return "".join([it if it.isprintable() or it in "\n\t" else it.encode("unicode_escape").decode() for it in text])
