"""Dead letters, read: what their headers say, which of them are of one fault, and which are chosen. Pure functions.

A dead letter is the record that failed, with headers of ours behind its own: see ``runtime.envelopes.dead_letter_row``,
of which ``read_letter`` is the inverse. Records that failed again after they were sent back have the headers of their
last failure only, since a redrive takes ours away.

Invariant: ``read_letter(dead_letter_row(record, …))`` has the record's own headers, and says so where any of headers,
key or value was cut; a letter that was cut is not the record any more.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from streamproc.errors import StreamprocError
from streamproc.records import TopicRecord
from streamproc.replay import marks

MAX_FAULTS = 1_000
"""Letters of further faults are counted together."""
MAX_MESSAGE_CHARACTERS = 300
MAX_EXAMPLE_CHARACTERS = 1_000
_FIRST_OF_OURS = "streamproc-source-topic"
_CUTS = {
    "value": "streamproc-value-cut-from-bytes",
    "headers": "streamproc-headers-cut",
    "key": "streamproc-key-cut-from-bytes",
}
# What differs from record to record within one fault: quoted values, identifiers, and whatever has a digit in it.
_QUOTED = re.compile(r"""(?<!\w)'[^']*'(?!\w)|"[^"]*"|`[^`]*`""")
_UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?\b\w*\d(?:(?:[\w.,:]|(?<=[eE])[+-](?=\d))*\w)?")


class LetterError(StreamprocError):
    """What should choose letters cannot."""

    exit_code = 2


class Fault(NamedTuple):
    """What letters of one group have in common; the message without what differs from record to record."""

    task: str
    cause: str
    stage: str
    error_type: str
    message: str

    @property
    def id(self) -> str:
        """Eight characters to name it by; the same in every topic and at every time."""
        return digest("\0".join(self))


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter. ``headers`` are the record's own; ``cut`` says what of the record is missing, and how much."""

    record: TopicRecord
    source: marks.Source
    task: str
    cause: str
    stage: str
    error_type: str
    message: str
    attempts: str
    worker: str
    traceback: str
    headers: list[tuple[str, bytes | None]]
    cut: Mapping[str, str]

    @property
    def place(self) -> marks.Source:
        """Where the letter itself is."""
        return marks.Source(self.record.topic, self.record.partition, self.record.offset)

    @property
    def fault(self) -> Fault:
        """The group that it belongs to."""
        return Fault(self.task, self.cause, self.stage, self.error_type, normalised(self.message))

    @property
    def replays(self) -> int:
        """How often it was sent back so far."""
        return marks.count_of(self.headers)


def read_letter(record: TopicRecord) -> Letter | None:
    """What a record of a dead-letter topic says; None where it is no dead letter of streamproc's."""
    names = [name for name, _ in record.headers]
    if _FIRST_OF_OURS not in names:
        return None
    first = len(names) - 1 - names[::-1].index(_FIRST_OF_OURS)
    told = {name: (value or b"").decode(errors="replace") for name, value in record.headers[first:]}
    partition, offset = told.get("streamproc-source-partition", ""), told.get("streamproc-source-offset", "")
    if "streamproc-cause" not in told or not (partition.isdecimal() and offset.isdecimal()):
        return None
    return Letter(
        record=record,
        source=marks.Source(told[_FIRST_OF_OURS], int(partition), int(offset)),
        task=told.get("streamproc-task", ""),
        cause=told["streamproc-cause"],
        stage=told.get("streamproc-stage", ""),
        error_type=told.get("streamproc-error-type", ""),
        message=told.get("streamproc-error-message", ""),
        attempts=told.get("streamproc-attempts", ""),
        worker=told.get("streamproc-worker", ""),
        traceback=told.get("streamproc-error-traceback", ""),
        headers=list(record.headers[:first]),
        cut={part: told[name] for part, name in _CUTS.items() if name in told},
    )


def normalised(message: str) -> str:
    """A message without what differs from record to record: quoted parts become …, what has a digit in it #."""
    message = message[:MAX_EXAMPLE_CHARACTERS]
    for pattern, instead in ((_QUOTED, "…"), (_UUID, "#"), (_NUMBER, "#")):
        message = pattern.sub(instead, message)
    message = " ".join(message.split())
    return message if len(message) <= MAX_MESSAGE_CHARACTERS else message[: MAX_MESSAGE_CHARACTERS - 1] + "…"


def digest(text: str) -> str:
    """Eight characters that stand for a text."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]


@dataclass(slots=True)
class Tally:
    """How many letters, the times in milliseconds of the first and the last of their records, and where one of them is.

    Of that one the message is kept as it is, up to 1,000 characters.
    """

    count: int = 0
    first_ms: int = 0
    last_ms: int = 0
    example: marks.Source | None = None
    example_message: str = ""

    def add(self, letter: Letter) -> None:
        """Count one more."""
        at = letter.record.timestamp
        self.first_ms = at if not self.count else min(self.first_ms, at)
        self.last_ms = at if not self.count else max(self.last_ms, at)
        self.count += 1
        # The latest that was read is the one that will be there longest.
        self.example = letter.place
        self.example_message = letter.message[:MAX_EXAMPLE_CHARACTERS]


@dataclass(slots=True)
class Faults:
    """Letters by fault, in bounded memory: of each fault a few numbers and one letter, of ``most`` faults."""

    most: int = MAX_FAULTS
    tallies: dict[Fault, Tally] = field(default_factory=dict)
    others: Tally = field(default_factory=Tally)
    foreign: int = 0
    """Records that are no dead letters of streamproc's."""

    def add(self, letter: Letter) -> None:
        """Count one more."""
        fault = letter.fault
        tally = self.tallies.get(fault)
        if tally is None:
            tally = self.others if len(self.tallies) >= self.most else self.tallies.setdefault(fault, Tally())
        tally.add(letter)

    @property
    def count(self) -> int:
        """All letters."""
        return self.others.count + sum(tally.count for tally in self.tallies.values())

    def most_first(self) -> list[tuple[Fault, Tally]]:
        """The faults, those with the most letters first."""
        return sorted(self.tallies.items(), key=lambda it: (-it[1].count, it[0]))


@dataclass(frozen=True, slots=True)
class Selection:
    """Which letters are meant: those that match everything that is said; of several of a kind, any.

    ``message`` is a text that the message contains, or a regular expression between slashes; ``where`` has fields of
    the value (``a.b`` for nested ones) and what they must be: text as it is, other values as JSON.
    """

    tasks: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    error_types: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    message: str = ""
    where: tuple[tuple[str, str], ...] = ()
    replays: int | None = None

    def __post_init__(self) -> None:
        self._pattern()

    def __contains__(self, letter: Letter) -> bool:
        return (
            (not self.tasks or letter.task in self.tasks)
            and (not self.causes or letter.cause in self.causes)
            and (not self.error_types or letter.error_type in self.error_types)
            and (self.replays is None or letter.replays == self.replays)
            and self._pattern().search(letter.message) is not None
            and (not self.faults or letter.fault.id in self.faults)
            and (not self.where or _has_fields(letter.record.value, self.where))
        )

    def described(self) -> dict[str, Any]:
        """What is said, and nothing else; in one order, whatever the order it was said in."""
        said = {
            "task": sorted(self.tasks),
            "cause": sorted(self.causes),
            "error_type": sorted(self.error_types),
            "fault": sorted(self.faults),
            "message": self.message,
            "where": sorted(f"{name}={value}" for name, value in self.where),
        }
        return {name: value for name, value in said.items() if value} | (
            {} if self.replays is None else {"replayed": self.replays}
        )

    def _pattern(self) -> re.Pattern[str]:
        """What to look for in messages; ``re`` keeps it. Raises LetterError."""
        text = self.message
        if len(text) <= 2 or not (text.startswith("/") and text.endswith("/")):
            return re.compile(re.escape(text))
        try:
            return re.compile(text[1:-1])
        except re.error as error:
            raise LetterError(
                f"--message {text} is no regular expression ({error}); mend it, or leave out the slashes to look for "
                f"the text as it is"
            ) from error


def _has_fields(value: bytes | None, where: Sequence[tuple[str, str]]) -> bool:
    try:
        document = orjson.loads(value or b"")
    except orjson.JSONDecodeError:
        return False
    return all(any(told == wanted for told in _texts_of(document, name)) for name, wanted in where)


def _texts_of(document: Any, name: str) -> Iterator[str]:
    """What a field is, as text and as JSON; nothing where there is no such field."""
    found = document
    for part in name.split("."):
        if type(found) is not dict or part not in found:
            return
        found = found[part]
    if isinstance(found, str):
        yield found
    yield orjson.dumps(found).decode()
