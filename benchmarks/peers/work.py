"""What every contestant shares: what it is told, the work on a record, and how it measures itself.

Imported by all contestants, each in an environment of its own, so nothing but orjson and numpy is needed here. Every
contestant does the work with these functions, so that no one's JSON library or array code is faster than another's.

A contestant is run as a process with one argument, a ``Task`` as JSON. It calls ``Meter.begin`` with its first record
in hand, and ``Meter.end`` once the last offset is committed, which writes what it measured as a line of JSON. Time and
CPU between the two are its own: what comes before and after (imports, joining the group, leaving it) is not counted.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

MODEL_S = 0.005
"""What a call of the model takes: it waits, as for a device, and leaves the cores to the others."""
COMMIT_INTERVAL_MS = 1_000
"""How often the peers commit beside the last time; arroyo's default, and streamproc's."""
MAX_BATCH_BYTES = 900_000
"""The most that a producer sends as one batch: the topics take a million bytes, as Kafka's default is."""
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Task:
    """What a contestant is told."""

    bootstrap: str
    source: str
    """Topic to read."""
    output: str
    """Topic to write."""
    group: str
    """Consumer group, new every time."""
    records: int
    """How many records the source holds."""
    work: str
    """Name of one of ``WORKS``."""
    batch: int
    """Most records in a call of the model, for those who can batch."""
    variant: str
    """Which of a contestant's configurations."""

    def argument(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def told(cls) -> Task:
        """From the command line."""
        return cls(**json.loads(sys.argv[1]))


class Work(NamedTuple):
    """What is done to records: from bytes, batch to batch, to bytes."""

    decode: Callable[[bytes], Any]
    apply: Callable[[list[Any]], Sequence[Any]]
    encode: Callable[[Any], bytes]
    is_identity: bool

    def batch(self, values: Sequence[bytes]) -> list[bytes]:
        """Many records in one call."""
        return list(map(self.encode, self.apply(list(map(self.decode, values)))))

    def one(self, value: bytes) -> bytes:
        """One record."""
        return self.encode(self.apply_one(self.decode(value)))

    def apply_one(self, record: Any) -> Any:
        """The model for one record."""
        return self.apply([record])[0]


def encode(record: Any) -> bytes:
    """JSON, arrays included."""
    return orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY)


def identity(records: list[Any]) -> list[Any]:
    """The records."""
    return records


def double(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Twice the numbers of each record, through one array."""
    doubled = np.array([record["values"] for record in records]) * 2
    return [{"id": record["id"], "values": row} for record, row in zip(records, doubled, strict=True)]


def wait_as_a_model(records: list[Any]) -> list[Any]:
    """The records, after as long as the model takes for a batch of any size."""
    time.sleep(MODEL_S)
    return records


def as_it_is(value: bytes) -> bytes:
    """The bytes."""
    return value


WORKS = {
    "json": Work(orjson.loads, identity, orjson.dumps, is_identity=True),
    "bytes": Work(as_it_is, identity, as_it_is, is_identity=True),
    "numpy": Work(orjson.loads, double, encode, is_identity=False),
    "model": Work(orjson.loads, wait_as_a_model, orjson.dumps, is_identity=False),
}


class Usage(NamedTuple):
    """A moment: the clock, this process's CPU time, and that of it and all processes below it."""

    clock_s: float
    own_s: float
    tree_s: float


class Meter:
    """Measures this process between its first record and its last commit."""

    def __init__(self) -> None:
        self.begun: Usage | None = None

    def begin(self) -> None:
        """Now is the first record in hand; called again it does nothing."""
        if self.begun is None:
            self.begun = usage()

    def end(self, share: float = 1.0) -> None:
        """Now is the last offset committed: write what was measured.

        ``share`` is the part of the records that was worked on since ``begin``, where some were done before.
        """
        ended, begun = usage(), self.begun
        if begun is None:
            raise RuntimeError("the end of a measurement that has not begun")
        report = {
            "wall_s": (ended.clock_s - begun.clock_s) / share,
            "own_cpu_s": (ended.own_s - begun.own_s) / share,
            "tree_cpu_s": (ended.tree_s - begun.tree_s) / share,
        }
        print(json.dumps(report), flush=True)


def usage() -> Usage:
    """The measures of this moment."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    below = resource.getrusage(resource.RUSAGE_CHILDREN)
    own_s = own.ru_utime + own.ru_stime
    return Usage(time.perf_counter(), own_s, own_s + below.ru_utime + below.ru_stime + _living_descendants_s())


def _living_descendants_s() -> float:
    """CPU time of the living processes below this one, and of the dead that they waited for."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # After the name, which is in parentheses and may hold anything.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            parents[int(entry.name)] = int(fields[1])
            ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    me, total = os.getpid(), 0
    for process, spent in ticks.items():
        parent = parents.get(process, 0)
        while parent not in {0, me}:
            parent = parents.get(parent, 0)
        total += spent if parent == me else 0
    return total / CLOCK_TICKS
