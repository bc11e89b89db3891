"""Windows over a table that is written record by record: against a brute-force sum, and killed at every write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, MutableMapping
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.stats.totals import MAX_NAMES, Totals, read_metrics
from streamproc.stats.view import fleet, published
from streamproc.stats.windows import KEPT, WIDTHS_S, WindowKey, Windows

NOW_MS = 1_700_000_000_000
GRACE_MS = 20_000
Records = list[tuple[int, bytes | None]]


class KilledError(Exception):
    """The process has ended."""


class Changelog(MutableMapping[str, dict[str, Any]]):
    """A table of which only what was written survives, as JSON; the process ends after so many writes."""

    def __init__(self, log: list[tuple[str, bytes | None]] | None = None, writes: int | None = None) -> None:
        self.log = [] if log is None else log
        self.writes = writes
        self._now: dict[str, dict[str, Any]] = {}
        for key, value in self.log:
            if value is None:
                self._now.pop(key, None)
            else:
                self._now[key] = orjson.loads(value)

    def _write(self, key: str, value: bytes | None) -> None:
        if self.writes == 0:
            raise KilledError
        if self.writes is not None:
            self.writes -= 1
        self.log.append((key, value))

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._now[key]

    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        told = orjson.dumps(value)
        self._write(key, told)
        self._now[key] = orjson.loads(told)

    def __delitem__(self, key: str) -> None:
        self._write(key, None)
        del self._now[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now)

    def __len__(self) -> int:
        return len(self._now)


def metrics_record(timestamp_ms: int, *, task: str = "text", replica: str | None = "a", records: int = 3) -> bytes:
    return orjson.dumps(
        {
            "task": task,
            "replica": replica,
            "timestamp": timestamp_ms,
            "records": records,
            "results": records - 1,
            "failed": 1,
            "causes": {"rejected": 1},
            "execution_times": {"execute": 1.5 * records, "transform_inputs": None},
            "wall_time": 2.0 * records,
            "predicted_wall_time": 1.0 * records,
            "closed_by": "size",
        }
    )


def numbered(values: list[bytes | None], gaps: list[int]) -> Records:
    """Offsets with gaps, as transactions leave them."""
    offset, records = -1, []
    for index, value in enumerate(values):
        offset += 1 + (gaps[index % len(gaps)] if gaps else 0)
        records.append((offset, value))
    return records


times = st.integers(min_value=NOW_MS - 180_000, max_value=NOW_MS)
told = st.builds(
    metrics_record,
    times,
    task=st.sampled_from(["text", "image"]),
    replica=st.sampled_from(["a", "b", None]),
    records=st.integers(min_value=1, max_value=9),
)
values = st.lists(st.one_of(told, told, told, st.sampled_from([None, b"no", b"[]", b'{"task": 1}'])), max_size=25)
gaps = st.lists(st.integers(min_value=0, max_value=2), max_size=3)
sizes = st.lists(st.integers(min_value=1, max_value=7), min_size=1, max_size=6)


def apply_all(windows: Windows, records: Records, sizes: list[int]) -> None:
    """All records, some at a time."""
    left, turn = list(records), 0
    while left:
        size = sizes[turn % len(sizes)]
        windows.apply(0, left[:size], NOW_MS)
        left, turn = left[size:], turn + 1


def by_hand(records: Records) -> tuple[dict[WindowKey, list[bytes]], Counter[str], int]:
    """What belongs into each window, what came too late for its, and what was none of ours."""
    found: dict[WindowKey, list[bytes]] = {}
    late: Counter[str] = Counter()
    malformed, greatest = 0, 0
    for _, value in records:
        it = None if value is None or value[:1] != b"{" else orjson.loads(value)
        if value is None or it is None or "timestamp" not in it:
            malformed += 1
            continue
        for width_s in (10, 60, 3_600):
            start = it["timestamp"] // (width_s * 1_000) * width_s * 1_000
            key = WindowKey(0, width_s, start, it["task"], it["replica"] or "unknown")
            if start + width_s * 1_000 + GRACE_MS <= greatest:
                late[str(width_s)] += 1
            else:
                found.setdefault(key, []).append(value)
        greatest = max(greatest, it["timestamp"])
    return found, late, malformed


def states(windows: Windows) -> dict[WindowKey, Any]:
    return {key: windows.totals(key).state() for key in windows.keys({0})}


@given(values, gaps, sizes)
def test_windows_hold_what_a_sum_by_hand_finds_however_many_are_read_at_a_time(
    values: list[bytes | None], gaps: list[int], sizes: list[int]
) -> None:
    records = numbered(values, gaps)
    windows = Windows(Changelog(), grace_ms=GRACE_MS)
    apply_all(windows, records, sizes)
    found, late, malformed = by_hand(records)
    assert set(windows.keys({0})) == set(found)
    for key, batches in found.items():
        totals, read = windows.totals(key), [orjson.loads(it) for it in batches]
        assert totals.batches == len(batches)
        assert totals.counts["records"] == sum(it["records"] for it in read)
        assert totals.causes == Counter({"rejected": len(batches)})
        assert totals.steps["execute"].sum == pytest.approx(sum(1.5 * it["records"] for it in read))
        assert totals.measures["wall_time_over_predicted"].quantile(0.5) == pytest.approx(2.0, rel=0.02)
    progress = windows.progress(0)
    assert (progress.late, progress.malformed) == (late, malformed)
    assert progress.applied == (records[-1][0] if records else -1)


@given(values, gaps, st.integers(min_value=0, max_value=25), sizes)
def test_records_that_are_read_again_change_nothing(
    values: list[bytes | None], gaps: list[int], prefix: int, sizes: list[int]
) -> None:
    records = numbered(values, gaps)
    once, again = (Windows(Changelog(), grace_ms=GRACE_MS) for _ in range(2))
    apply_all(once, records, sizes)
    apply_all(again, records[:prefix], sizes)
    apply_all(again, records, sizes[::-1])
    apply_all(again, records[prefix:], sizes)
    assert states(again) == states(once)
    assert again.progress(0) == once.progress(0)


def close(windows: Windows, topic: dict[str, list[Any]]) -> None:
    """As the application does after each read: publish what is due, note it."""
    if windows.has_due(0):
        for key, value in published("metrics", windows.due(0)):
            topic.setdefault(key, []).append(value)
        windows.closed(0)


@given(values, gaps, sizes, st.lists(st.integers(min_value=0, max_value=60), min_size=1, max_size=4), st.data())
def test_killed_at_any_write_and_started_again_it_counts_and_publishes_as_if_it_had_not_been(
    values: list[bytes | None], gaps: list[int], sizes: list[int], lives: list[int], data: st.DataObject
) -> None:
    records = numbered(values, gaps)
    undisturbed: dict[str, list[Any]] = {}
    whole = Windows(Changelog(), grace_ms=GRACE_MS)
    for at in range(0, len(records), 3):
        whole.apply(0, records[at : at + 3], NOW_MS)
        close(whole, undisturbed)

    log: list[tuple[str, bytes | None]] = []
    topic: dict[str, list[Any]] = {}
    committed = 0
    for writes in [*lives, None]:
        windows = Windows(Changelog(log, writes), grace_ms=GRACE_MS)
        at = data.draw(st.integers(min_value=0, max_value=committed), label="read again from")
        turn = 0
        try:
            close(windows, topic)
            while at < len(records):
                size = sizes[turn % len(sizes)]
                windows.apply(0, records[at : at + size], NOW_MS)
                close(windows, topic)
                at, turn = at + size, turn + 1
                committed = max(committed, min(at, len(records)))
        except KilledError:
            continue
    final = Windows(Changelog(log), grace_ms=GRACE_MS)
    assert final.progress(0).late == whole.progress(0).late
    assert final.progress(0).applied == whole.progress(0).applied
    assert states(final) == states(whole)
    assert topic.keys() == undisturbed.keys()
    for key, rows in topic.items():
        # Perhaps more than once, and then the same; only how it is described may not differ.
        assert all(row == undisturbed[key][0] for row in rows)


def test_a_window_takes_late_records_within_the_grace_then_closes_and_is_at_last_forgotten() -> None:
    windows = Windows(Changelog(), grace_ms=GRACE_MS)
    start = NOW_MS - NOW_MS % 10_000
    key = WindowKey(0, 10, start, "text", "a")
    windows.apply(
        0, [(0, metrics_record(start)), (1, metrics_record(start + 29_999)), (2, metrics_record(start))], NOW_MS
    )
    assert windows.totals(key).batches == 2
    assert not windows.is_closed(key)
    assert list(windows.due(0)) == []
    windows.apply(0, [(3, metrics_record(start + 30_000)), (4, metrics_record(start + 9_999))], start + 30_000)
    assert windows.totals(key).batches == 2
    assert windows.progress(0).late == {"10": 1}
    assert windows.is_closed(key)
    assert [it for it, _ in windows.due(0)] == [key]
    windows.closed(0)
    assert list(windows.due(0)) == []
    assert key in windows.keys({0})
    forgotten_ms = start + 10_000 + GRACE_MS + KEPT * 10_000
    windows.apply(0, [(5, metrics_record(forgotten_ms))], forgotten_ms)
    windows.closed(0)
    assert key not in windows.keys({0})


def test_the_table_is_bounded_however_long_it_runs() -> None:
    windows = Windows(Changelog(), grace_ms=GRACE_MS)
    most = 0
    for offset in range(400):
        at_ms = NOW_MS + offset * 97_000
        windows.apply(0, [(offset, metrics_record(at_ms, replica=f"r{offset % 3}"))], at_ms)
        if windows.has_due(0):
            windows.closed(0)
        most = max(most, len(windows.keys({0})))
    span_s = {width_s: width_s * (KEPT + 1) + GRACE_MS // 1_000 for width_s in WIDTHS_S}
    assert most <= sum(3 * (span // min(width_s, 97) + 1) for width_s, span in span_s.items())


def test_a_clock_that_is_far_ahead_makes_no_others_late() -> None:
    windows = Windows(Changelog(), grace_ms=GRACE_MS)
    windows.apply(0, [(0, metrics_record(NOW_MS + GRACE_MS + 1)), (1, metrics_record(NOW_MS))], NOW_MS)
    progress = windows.progress(0)
    assert (progress.early, progress.watermark_ms, sum(progress.late.values())) == (1, NOW_MS, 0)


def test_time_goes_on_without_records_where_it_is_told_to() -> None:
    windows = Windows(Changelog(), grace_ms=GRACE_MS)
    windows.advance(0, NOW_MS)  # nothing was read yet: nothing to close
    assert len(windows.keys({0})) == 0
    assert not windows.has_due(0)
    windows.apply(0, [(0, metrics_record(NOW_MS))], NOW_MS)
    windows.advance(0, NOW_MS + 10_000_000)
    assert {key.width_s for key, _ in windows.due(0)} == {10, 60, 3_600}
    windows.advance(0, NOW_MS)
    assert windows.progress(0).watermark_ms == NOW_MS + 10_000_000


def test_partitions_have_parts_of_their_own() -> None:
    windows = Windows(Changelog(), grace_ms=GRACE_MS)
    windows.apply(0, [(7, metrics_record(NOW_MS))], NOW_MS)
    windows.apply(1, [(2, metrics_record(NOW_MS, records=5))], NOW_MS)
    assert (windows.progress(0).applied, windows.progress(1).applied) == (7, 2)
    assert {key.partition for key in windows.keys({1})} == {1}
    (window, *_) = fleet({"metrics": (windows, [0, 1])}, width_s=60, last=1)
    assert (window["fleet"]["records"], window["tasks"]["text"]["replicas"]["a"]["batches"]) == (8, 2)
    (window, *_) = fleet({"metrics": (windows, [1])}, width_s=60, last=1)
    assert window["fleet"]["records"] == 5


def test_the_view_and_the_published_rows_add_replicas_up_and_never_average() -> None:
    windows = Windows(Changelog(), grace_ms=GRACE_MS)
    slow = [metrics_record(NOW_MS, replica="slow", records=100)] * 10
    fast = [metrics_record(NOW_MS, replica="fast", records=1)] * 90
    windows.apply(0, list(enumerate([*slow, *fast])), NOW_MS)
    (window,) = fleet({"metrics": (windows, [0])}, width_s=3_600, last=5)
    step = window["fleet"]["execution_times"]["execute"]
    assert (step["count"], step["sum"], step["p50"], step["max"]) == (100, 1_635.0, pytest.approx(1.5, rel=0.02), 150)
    assert step["p99"] == pytest.approx(150, rel=0.02)
    assert set(window["tasks"]["text"]["replicas"]) == {"slow", "fast"}
    windows.advance(0, NOW_MS + 4_000_000)
    rows = [value for _, value in published("metrics", windows.due(0)) if value["window_s"] == 10]
    assert [(row["replica"], row["batches"]) for row in sorted(rows, key=lambda row: row["replica"] or "")] == [
        (None, 100),
        ("fast", 90),
        ("slow", 10),
    ]
    assert sum(rows[0]["execution_times"]["execute"]["buckets"].values()) == rows[0]["batches"]


def test_names_that_others_choose_do_not_grow_without_end() -> None:
    totals = Totals()
    for number in range(3 * MAX_NAMES):
        record = orjson.loads(metrics_record(NOW_MS))
        record["causes"] = {f"cause-{number}": 1}
        record["execution_times"] = {f"step-{number}": 1.0}
        batch = read_metrics(orjson.dumps(record))
        assert batch is not None
        totals.add(batch)
    assert len(totals.causes) == len(totals.steps) == MAX_NAMES + 1
    assert totals.causes["other"] == 2 * MAX_NAMES
