"""What readers see of windows: the records of the stats topic, and the fleet's view over HTTP. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streamproc.stats.totals import Totals
from streamproc.stats.windows import WindowKey, Windows


def published(topic: str, due: Iterable[tuple[WindowKey, Totals]]) -> list[tuple[str, dict[str, Any]]]:
    """The records of closed windows of one partition of a metrics topic: keys and values.

    One for each replica's task, and one for each task, over the replicas, whose ``replica`` is null.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    tasks: defaultdict[WindowKey, Totals] = defaultdict(Totals)
    for key, totals in due:
        rows.append(_row(topic, key, totals, key.replica))
        tasks[key._replace(replica="")].merge(totals)
    rows += [_row(topic, key, totals, None) for key, totals in tasks.items()]
    return sorted(rows, key=lambda row: (row[1]["start"], row[0]))


def _row(topic: str, key: WindowKey, totals: Totals, replica: str | None) -> tuple[str, dict[str, Any]]:
    value = {
        "window_s": key.width_s,
        "start": key.start_ms,
        "end": key.end_ms,
        "task": key.task,
        "replica": replica,
        "topic": topic,
        "partition": key.partition,
        **totals.described(buckets=True),
    }
    return f"{topic}/{key.text}", value


def fleet(
    tables: Mapping[str, tuple[Windows, Sequence[int]]], *, width_s: int, last: int, task: str | None = None
) -> list[dict[str, Any]]:
    """The newest windows of a width, the newest first: the fleet's totals, its tasks' and their replicas'.

    ``tables`` has the windows of each metrics topic, and the partitions that are read here.
    """
    found = [
        (windows, key)
        for windows, partitions in tables.values()
        for key in windows.keys(set(partitions))
        if key.width_s == width_s and task in (None, key.task)
    ]
    starts = sorted({key.start_ms for _, key in found}, reverse=True)[:last]
    told = []
    for start_ms in starts:
        here = [(windows, key) for windows, key in found if key.start_ms == start_ms]
        tasks: defaultdict[str, defaultdict[str, Totals]] = defaultdict(lambda: defaultdict(Totals))
        for windows, key in here:
            tasks[key.task][key.replica].merge(windows.totals(key))
        told.append(
            {
                "start": start_ms,
                "end": start_ms + 1_000 * width_s,
                "closed": all(windows.is_closed(key) for windows, key in here),
                "fleet": _merged(totals for replicas in tasks.values() for totals in replicas.values()),
                "tasks": {
                    name: {
                        **_merged(replicas.values()),
                        "replicas": {it: replicas[it].described(buckets=False) for it in sorted(replicas)},
                    }
                    for name, replicas in sorted(tasks.items())
                },
            }
        )
    return told


def _merged(some: Iterable[Totals]) -> dict[str, Any]:
    together = Totals()
    for totals in some:
        together.merge(totals)
    return together.described(buckets=False)
