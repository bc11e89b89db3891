"""An estimate from beginning to end, of a stand-in whose costs are known; and what is said of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from html import escape
from typing import Any

import pytest

from streamproc.estimate.measure import Measured, measure
from streamproc.estimate.page import html_page
from streamproc.estimate.prober import End, Loaded, Ran
from streamproc.estimate.samples import Samples, measure_of
from streamproc.estimate.search import Search
from streamproc.estimate.words import explained
from streamproc.runtime.estimate_file import Estimate
from streamproc.runtime.memory_budget import Budget
from streamproc.settings import LengthSettings, Settings

MIB = 1 << 20
IDLE = 200 * MIB
BYTES = measure_of(LengthSettings(of="bytes"), by_backend=len)
RECORDS: list[dict[str, Any]] = [{"text": "x" * it} for it in range(10, 1_200, 7)]
NOW = datetime(2026, 1, 2, tzinfo=UTC)


@dataclass
class Backend:
    """Takes 4 ms and 0.01 ms by unit of length; holds 200 MiB and 20 bytes by the square of each length."""

    budget_bytes: float
    kept: float = 0.0
    """The share of a process's largest batch that its allocator keeps beside the next one."""
    slower_from: int = 10**9
    """From this size on each record takes twice as long."""
    now: float = 0.0
    held: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(1))

    def start(self) -> None:
        self.held = 0.0
        self.now += 0.05

    def run(
        self, batches: Sequence[Sequence[dict[str, Any]]], *, seconds: float, runs: int = 7, fresh: bool = True
    ) -> Ran | End:
        assert seconds >= 0
        assert runs >= 1
        self.held *= not fresh
        size, length = len(batches[0]), max(BYTES(it) for it in batches[0])
        grown = size * 20.0 * length**2
        needed = IDLE + grown + self.held
        if needed > self.budget_bytes:
            return End.MEMORY
        self.held = max(self.held, grown * self.kept)
        took = (4 + size * 0.01 * length * (4 if size >= self.slower_from else 1)) * self.rng.uniform(0.98, 1.02)
        self.now += took / 1_000
        return Ran([took], round(needed), 0)


def measured(backend: Backend, *, length: str | None = "bytes", max_size: int = 64) -> Measured:
    batch = {"max_size": max_size} | ({} if length is None else {"length": length})
    settings = Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": "inference:Backend"},
            "tasks": {"text": {"input": {"topics": ["in"]}, "batch": batch}},
        }
    )
    samples = Samples(RECORDS, measure_of(settings.tasks["text"].batch.length, by_backend=len))
    search = Search(
        backend,
        samples,
        max_size=max_size,
        budget_bytes=backend.budget_bytes,
        seconds=1_000.0,
        load_seconds=0.05,
        clock=lambda: backend.now,
    )
    loaded = Loaded(0.05, "host", IDLE, None, {"numpy": "2"})
    budget = Budget(int(backend.budget_bytes), "--memory-budget")
    return measure(settings, "text", search, samples, loaded, budget=budget, environ={}, now=lambda: NOW)


def test_costs_that_are_known_are_found_and_their_error_is_small() -> None:
    it = measured(Backend(budget_bytes=4e9))
    cost = it.estimate.cost
    assert cost.time_ms(20, 500) == pytest.approx(4 + 20 * 5, rel=0.05)
    assert cost.memory_bytes(20, 500) == pytest.approx(IDLE + 20 * 20 * 500**2, rel=0.02)
    assert it.time.terms == ("1", "n·L")
    assert it.memory.terms == ("1", "n·L²")
    assert it.how.held_out.shapes == 12
    assert it.how.held_out.time is not None
    assert it.how.held_out.time < 0.05
    assert it.how.held_out.memory is not None
    assert it.how.held_out.memory < 0.01
    assert 1 <= it.estimate.kappa < 1.02
    assert it.estimate.fingerprint["package numpy"] == "2"
    assert Estimate.model_validate_json(it.estimate.model_dump_json()) == it.estimate


def test_what_an_allocator_keeps_is_in_the_factor() -> None:
    """A process that has run the largest batch keeps a third of it beside whatever comes."""
    plain, kept = measured(Backend(4e9)), measured(Backend(4e9, kept=1 / 3))
    assert kept.estimate.kappa > plain.estimate.kappa + 0.05


def test_sizes_that_do_no_more_a_second_are_not_recommended() -> None:
    it = measured(Backend(1e12, slower_from=16))
    assert it.estimate.max_size == 8
    assert any("More than 8 records at a time do no more a second" in sentence for sentence in explained(it))


def test_a_budget_that_ends_it_is_told_with_the_room_that_it_leaves() -> None:
    it = measured(Backend(500 * MIB), max_size=1_000)
    text = " ".join(explained(it))
    assert "Memory ended the search at " in text
    most = int((500 * MIB / it.estimate.kappa - it.estimate.cost.a_bytes) / it.estimate.cost.record_bytes(1_197))
    longest = it.how.lengths[1]
    assert most == pytest.approx(300 * MIB / (20 * longest**2), abs=1.5)
    assert f"room for {most:,} records of {longest:,} bytes at a time" in text


@pytest.mark.parametrize(
    ("length", "by"),
    [("backend", "by the backend's length method"), ({"field": "text", "unit": "value"}, "by the field text")],
)
def test_lengths_without_a_unit_are_told_with_who_says_them(length: str | dict[str, str], by: str) -> None:
    it = measured(Backend(4e9))
    settings = LengthSettings.model_validate(length)
    it = replace(it, estimate=it.estimate.model_copy(update={"length": settings.text}))
    text = " ".join(explained(it))
    least, most = it.how.lengths
    assert f"Lengths from {least:,} to {most:,} ({by}) were measured; beyond" in text
    assert "ms for each 1,000 units that it is padded to" in text
    page = html_page(it)
    assert f"Time of a batch, ms by length ({escape(by)})" in page
    assert "<th>length</th>" in page


def test_all_of_it_is_told_in_words_and_on_the_page() -> None:
    it = measured(Backend(4e9))
    text = " ".join(explained(it))
    assert "Time: a batch takes 3.9" in text or "Time: a batch takes 4" in text
    assert "ms for each 1,000 bytes that it is padded to" in text
    assert (
        "Memory: a worker holds 200 MiB, and each record of a batch 19.1 MiB for the square of each 1,000 bytes" in text
    )
    assert f"max_size: {it.estimate.max_size}, max_padded: {it.estimate.max_padded}" in text
    page = html_page(it)
    assert page.count("<svg") == 5
    assert "<script" not in page
    assert "2026-01-02" in page


def test_records_without_a_length_count_as_equals() -> None:
    it = measured(Backend(1e12), length=None)
    assert it.estimate.max_padded is None
    assert it.estimate.cost.gamma_ms == it.estimate.cost.delta_ms == 0
    assert any("batch.length is not set" in sentence for sentence in explained(it))
