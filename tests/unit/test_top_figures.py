"""What ``streamproc top`` makes of statuses: rates, restarts, losses, totals, and lines that fit."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from streamproc.cli.top_frame import frame
from streamproc.cli.top_history import RATES_S, Figures, History
from streamproc.observe.status import EXAMPLE, Observed, ProcessorStatus

URL, OTHER = "http://here:1", "http://there:2"


def after(seconds: float, before: ProcessorStatus = EXAMPLE, *, task: str = "text", **counts: int) -> ProcessorStatus:
    """A status of so many seconds later, in which these counters have grown by so much."""
    was = before.tasks[task]
    grown = {name: getattr(was.counts, name) + by for name, by in counts.items()}
    changed = was.model_copy(update={"counts": was.counts.model_copy(update=grown)})
    return before.model_copy(
        update={"uptime_s": before.uptime_s + seconds, "tasks": {**before.tasks, task: changed}},
    )


def started_anew(uptime_s: float, **counts: int) -> ProcessorStatus:
    """The status of another process, which has been up for so long and has counted this."""
    text = EXAMPLE.tasks["text"]
    zero = text.counts.model_copy(update={"taken": 0, "results": 0, "dead": 0, **counts})
    return EXAMPLE.model_copy(
        update={
            "started_at": EXAMPLE.started_at + timedelta(seconds=100),
            "uptime_s": uptime_s,
            "tasks": {"text": text.model_copy(update={"counts": zero, "batches": type(text.batches)()})},
        }
    )


def shown(*readings: tuple[float, ProcessorStatus]) -> Figures:
    history = History([URL])
    for now, status in readings:
        history.add(URL, status, now)
    return history.next_frame(readings[-1][0])


def text_of(seen: Figures, width: int = 80, height: int | None = None, **options: Any) -> str:
    return "\n".join(line.plain for line in frame(seen, width, height, **options))


def test_one_status_has_no_rate_and_two_have_that_of_the_time_between() -> None:
    assert shown((10.0, EXAMPLE)).tasks["text"].read_per_s is None
    seen = shown((10.0, EXAMPLE), (12.0, after(2.0, taken=300, results=100)))
    text = seen.tasks["text"]
    assert (text.read_per_s, text.results_per_s) == (150.0, 50.0)
    assert (seen.read_per_s, seen.results_per_s) == (150.0, 50.0)
    assert (text.lag_records, text.lag_seconds, text.in_flight_records) == (130, 0.05, 128)
    assert text.given_up_by_cause == {"invalid": 1}


def test_rates_are_of_the_last_seconds_and_not_of_all_that_was_seen() -> None:
    slow = after(1.0, results=1)
    history = History([URL])
    history.add(URL, EXAMPLE, 0.0)
    history.add(URL, slow, 1.0)
    status = slow
    for second in range(2, 20):
        status = after(1.0, status, results=40)
        history.add(URL, status, float(second))
    assert history.next_frame(19.0).results_per_s == 40.0


def test_statuses_that_are_further_apart_than_the_time_of_rates_are_compared_all_the_same() -> None:
    apart = 6 * RATES_S
    assert shown((0.0, EXAMPLE), (apart, after(apart, results=300))).results_per_s == 300 / apart


def test_means_are_of_the_batches_in_between_and_of_none_where_there_were_none() -> None:
    before = EXAMPLE.tasks["text"].batches
    grown = before.model_copy(
        update={
            "size": Observed(count=before.size.count + 4, sum=before.size.sum + 100),
            "fill": Observed(count=before.fill.count + 4, sum=before.fill.sum + 3),
            "steps_ms": {
                **before.steps_ms,
                "execute": Observed(
                    count=before.steps_ms["execute"].count + 4, sum=before.steps_ms["execute"].sum + 20
                ),
            },
        }
    )
    text = EXAMPLE.tasks["text"].model_copy(update={"batches": grown})
    seen = shown((0.0, EXAMPLE), (2.0, EXAMPLE.model_copy(update={"tasks": {"text": text}}))).tasks["text"]
    assert (seen.batches_per_s, seen.batch_records, seen.fill) == (2.0, 25.0, 0.75)
    assert seen.steps_ms == {"execute": pytest.approx(5.0)}
    assert seen.wait_ms is None


def test_quantiles_are_of_the_records_in_between_of_all_replicas() -> None:
    was = EXAMPLE.tasks["text"]
    (bucket, *_) = was.latency_ms.buckets
    buckets = [(*bucket[:2], bucket[2] + 3), *was.latency_ms.buckets[1:], (100.0, 200.0, 1)]
    latency = was.latency_ms.model_copy(update={"count": was.latency_ms.count + 4, "buckets": buckets})
    later = EXAMPLE.model_copy(update={"tasks": {"text": was.model_copy(update={"latency_ms": latency})}})
    assert shown((0.0, EXAMPLE)).tasks["text"].latency_p99_ms is None
    assert shown((0.0, EXAMPLE), (1.0, EXAMPLE)).tasks["text"].latency_p99_ms is None
    text = shown((0.0, EXAMPLE), (1.0, later)).tasks["text"]
    assert text.latency_p50_ms == pytest.approx(10 + 5 * 2 / 3)
    assert text.latency_p99_ms == pytest.approx(196.0)
    history = History([URL, OTHER])
    for url, status in ((URL, later), (OTHER, EXAMPLE)):
        history.add(url, EXAMPLE, 0.0)
        history.add(url, status, 1.0)
    seen = history.next_frame(1.0)
    assert seen.tasks["text"].latency_p99_ms == pytest.approx(196.0)
    assert "196 ms" in text_of(seen, width=120)


def test_a_process_that_was_started_anew_is_counted_from_its_start() -> None:
    seen = shown((0.0, EXAMPLE), (10.0, started_anew(4.0, results=100)))
    assert seen.results_per_s == 25.0
    assert seen.replicas[0].restarts == 1
    assert "started anew once meanwhile" in text_of(seen)


def test_a_counter_that_falls_is_a_start_even_where_the_clock_of_the_machine_hides_it() -> None:
    fallen = started_anew(4.0, results=100).model_copy(update={"started_at": EXAMPLE.started_at})
    seen = shown((0.0, EXAMPLE), (10.0, fallen))
    assert (seen.results_per_s, seen.replicas[0].restarts) == (25.0, 1)


@given(
    st.lists(
        st.tuples(st.floats(0.1, 20.0), st.integers(0, 10_000), st.booleans()),
        min_size=1,
        max_size=20,
    )
)
def test_no_rate_is_negative_and_none_is_more_than_was_done(steps: list[tuple[float, int, bool]]) -> None:
    history = History([URL])
    now, status, starts, fastest = 0.0, EXAMPLE, 0, 0.0
    history.add(URL, status, now)
    for seconds, results, anew in steps:
        now += seconds
        if anew:
            starts += 1
            status = started_anew(seconds, results=results).model_copy(
                update={"started_at": EXAMPLE.started_at + timedelta(seconds=now)}
            )
        else:
            status = after(seconds, status, results=results)
        fastest = max(fastest, results / seconds)
        history.add(URL, status, now)
        rate = history.next_frame(now).results_per_s
        assert rate is not None
        assert 0.0 <= rate <= fastest * (1 + 1e-9)
    assert history.next_frame(now).replicas[0].restarts == starts


def test_a_replica_that_goes_away_is_lost_counts_nowhere_and_comes_back() -> None:
    history = History([URL, OTHER])
    for url in (URL, OTHER):
        history.add(url, EXAMPLE, 0.0)
        history.add(url, after(1.0, results=10), 1.0)
    assert history.next_frame(1.0).results_per_s == 20.0
    history.lose(OTHER, "Connection refused", 2.0)
    history.add(URL, after(2.0, results=20), 2.0)
    seen = history.next_frame(4.0)
    assert (seen.results_per_s, seen.in_flight_records) == (10.0, 128)
    lost = seen.replicas[1]
    assert (lost.answers, lost.lost_s, lost.tasks, lost.name) == (False, 2.0, {}, "sentiment")
    assert "2: lost for 2 s: Connection refused" in text_of(seen)
    history.add(OTHER, after(5.0, results=50), 5.0)
    history.add(URL, after(5.0, results=50), 5.0)
    back = history.next_frame(5.0)
    assert back.replicas[1].answers
    assert back.results_per_s == pytest.approx(20.0)
    assert back.replicas[1].restarts == 0


def test_where_nobody_answers_there_is_nothing_but_the_reason() -> None:
    history = History([URL])
    history.add(URL, EXAMPLE, 0.0)
    history.lose(URL, "Connection refused", 1.0)
    seen = history.next_frame(1.0)
    assert (seen.tasks, seen.results_per_s, seen.trend) == ({}, None, [None])
    assert text_of(seen).splitlines()[:2] == [
        "sentiment  lost  generation 2  backend 2024-05  http://here:1",
        "lost for 0 s: Connection refused",
    ]


def test_replicas_are_added_up_and_the_worst_of_them_is_told() -> None:
    text = EXAMPLE.tasks["text"]
    open_ = text.circuit.model_copy(update={"state": "open", "reason": "812 of 1,000 records failed"})
    ill = EXAMPLE.model_copy(
        update={
            "tasks": {"text": text.model_copy(update={"circuit": open_, "paused": True})},
            "not_ready": ["task text is paused"],
        }
    )
    history = History([URL, OTHER])
    history.add(URL, EXAMPLE, 0.0)
    history.add(OTHER, ill, 0.0)
    seen = history.next_frame(0.0)
    both = seen.tasks["text"]
    assert (both.circuit, both.state, both.lag_records, both.dead) == ("1 of 2 open", "paused", 260, 2)
    assert both.lag_seconds == 0.05
    told = text_of(seen, 120)
    assert "text: the circuit is 1 of 2 open: 812 of 1,000 records failed" in told
    assert "2: task text is paused" in told
    assert "1.0" in told
    assert "2.0" in told


def test_a_frame_of_80_columns_has_all_there_is_to_see() -> None:
    told = text_of(shown((0.0, EXAMPLE), (2.0, after(2.0, taken=24_690, results=24_690))))
    for part in (
        *("sentiment", "ready", "up 63.5 s", "generation 2", "backend 2024-05", URL),
        *("running", "closed", "12.3k", "130", "50 ms", "128", "retried", "dead"),
        *("given up: 1 invalid", "4711", "busy", "64 of text", "8.3 ms", "66", "212 MiB"),
    ):
        assert part in told, part


@given(
    width=st.integers(1, 130),
    height=st.none() | st.integers(1, 40),
    name=st.text(min_size=1, max_size=40),
    reason=st.text(max_size=200),
    lost=st.booleans(),
)
def test_a_frame_fits_and_prints_nothing_but_text(
    width: int, height: int | None, name: str, reason: str, lost: bool
) -> None:
    text = EXAMPLE.tasks["text"]
    circuit = text.circuit.model_copy(update={"state": "open", "reason": reason})
    named = EXAMPLE.model_copy(
        update={"name": name, "tasks": {name: text.model_copy(update={"circuit": circuit, "reason": reason})}}
    )
    history = History([URL, OTHER] if len(reason) % 2 else [URL])
    history.add(URL, named, 0.0)
    if lost:
        history.lose(URL, reason, 1.0)
    lines = frame(history.next_frame(2.0), width, height, hint="q ends")
    assert all(cell_len(line.plain) <= width for line in lines)
    assert height is None or len(lines) <= height
    assert all(line.plain.isprintable() for line in lines)


def test_what_does_not_fit_into_the_height_is_said() -> None:
    seen = shown((0.0, EXAMPLE))
    whole = text_of(seen).splitlines()
    cut = text_of(seen, height=8, hint="q ends").splitlines()
    assert cut == [*whole[:6], f"… {len(whole) - 6} more lines in a higher window", "q ends"]


def test_the_trend_is_of_what_was_done_with_a_gap_where_nobody_answered() -> None:
    history = History([URL])
    status = EXAMPLE
    history.add(URL, status, 0.0)
    for second, results in enumerate((0, 100, 100, 400), 1):
        # Far apart, so that each rate is of its own records.
        status = after(10.0, status, results=results)
        history.add(URL, status, 10.0 * second)
        seen = history.next_frame(10.0 * second)
    assert text_of(seen).splitlines()[2] == "results 40/s ▁▃▃█"
    assert text_of(seen, ascii_only=True).splitlines()[2] == "results 40/s _--#"
    history.lose(URL, "gone", 41.0)
    history.next_frame(41.0)
    history.add(URL, after(10.0, status, results=400), 50.0)
    assert text_of(history.next_frame(50.0)).splitlines()[2] == "results 40/s ▁▃▃█ █"
