"""Memory in a running processor: batches that run out of it get smaller, and those of an estimate never do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamproc.runtime.estimate_file import Estimate, MemoryCoefficients, TimeCoefficients, write_estimate
from streamproc.settings import Settings
from streamproc.testing import Pipeline

ROOT = Path(__file__).parents[2]
ROOM_MB = 64
PAD = 1_024
"""Characters of a record's: each takes 4 MiB, so that 16 have no room, beside what Python needs."""
IDLE_BYTES = 100 << 20


def settings_for(
    folder: Path, *, backend: str = "Padding", pool: dict[str, Any] | None = None, **batch: Any
) -> Settings:
    return Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": f"tests.support.backends:{backend}", "base_dir": str(ROOT)},
            "pool": {"env": {"ROOM_MB": str(ROOM_MB)}, "restart_backoff_ms": 5, "start_attempts": 1, **(pool or {})},
            "topics_dir": "nowhere",
            "estimates_dir": str(folder),
            "tasks": {"main": {"input": {"topics": ["in"]}, "batch": {"max_wait_ms": 50, **batch}}},
        }
    )


def write(folder: Path, **fields: Any) -> None:
    """What ``streamproc estimate`` would find of the backend: L is the bytes of the value, some more than the pad."""
    estimate = Estimate(
        length="bytes",
        time=TimeCoefficients(alpha_ms=1, delta_ms=1e-6),
        memory=MemoryCoefficients(a_bytes=IDLE_BYTES, d_bytes=4),
        **fields,
    )
    write_estimate(folder / "main.estimate.json", estimate)


@pytest.fixture
def make() -> Iterator[Callable[..., Pipeline]]:
    made: list[Pipeline] = []

    def make(settings: Settings) -> Pipeline:
        made.append(Pipeline(settings, deadline_s=60.0))
        return made[-1].__enter__()

    yield make
    for it in made:
        it.stop()


def record(number: int, length: int = PAD) -> dict[str, Any]:
    return {"id": number, "pad": "x" * length}


@pytest.mark.parametrize("batch", [{}, {"length": "bytes"}, {"length": "bytes", "strategy": "exact"}])
def test_batches_that_run_out_of_memory_get_smaller_and_no_record_is_lost(
    make: Callable[..., Pipeline], tmp_path: Path, caplog: pytest.LogCaptureFixture, batch: dict[str, Any]
) -> None:
    pipeline = make(settings_for(tmp_path, max_size=64, **batch))
    outputs = pipeline.process([record(it) for it in range(600)])
    assert [value["id"] for value in outputs.values] == list(range(600))
    assert not outputs.dead_letters
    sizes = [it["records"] for it in outputs.metrics if it["attempts"] == 1]
    assert 8 <= max(sizes) <= ROOM_MB // 4, "as large as there is room, and no larger"
    said = [it for it in caplog.messages if "ran out of memory; from now on such a batch has at most" in it]
    assert 1 <= len(said) <= 12
    caplog.clear()
    more = pipeline.process([record(it) for it in range(600, 900)])
    assert [value["id"] for value in more.values] == list(range(600, 900))
    assert {it["attempts"] for it in more.metrics} == {1}, "it is known by now what fits"
    assert not caplog.messages


def test_batches_that_an_estimate_predicts_never_run_out(
    make: Callable[..., Pipeline], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, max_size=50)
    budget_mb = (IDLE_BYTES >> 20) + ROOM_MB * 9 // 10
    with caplog.at_level(logging.INFO):
        pipeline = make(settings_for(tmp_path, length="bytes", memory_budget_mb=budget_mb))
        lengths = [10 * 4 ** (it % 4) for it in range(500)] + [PAD] * 200
        outputs = pipeline.process([record(it, length) for it, length in enumerate(lengths)])
    assert [value["id"] for value in outputs.values] == list(range(700))
    assert {it["attempts"] for it in outputs.metrics} == {1}
    assert any("main.estimate.json: a batch has at most 50 records" in it for it in caplog.messages)
    assert not any("out of memory" in it for it in caplog.messages)
    assert max(it["records"] for it in outputs.metrics) == 50, "the estimate's max_size"
    assert "memory" in {it["closed_by"] for it in outputs.metrics}
    assert all(it["predicted_memory"] <= budget_mb << 20 for it in outputs.metrics)
    assert all(it["memory"] > 10 << 20 for it in outputs.metrics)
    largest = max(outputs.metrics, key=lambda it: it["predicted_memory"])
    assert largest["memory"] > min(it["memory"] for it in outputs.metrics) + (20 << 20), "peaks are told apart"
    cost = pipeline.status().tasks["main"].cost
    assert cost is not None
    assert (cost.trusted, cost.d_bytes, cost.memory_budget_mb, cost.max_size) == (True, 4.0, budget_mb, 50)
    assert cost.estimate == str(tmp_path / "main.estimate.json")


def test_what_needs_more_memory_than_predicted_raises_the_factor(make: Callable[..., Pipeline], tmp_path: Path) -> None:
    write(tmp_path, max_size=4)
    estimate = tmp_path / "main.estimate.json"
    estimate.write_text(estimate.read_text().replace(f"{float(IDLE_BYTES)}", "1000000.0"))
    pipeline = make(settings_for(tmp_path, length="bytes", memory_budget_mb=100_000))
    outputs = pipeline.process([record(it, 10) for it in range(8)])
    seen = max(it["memory"] for it in outputs.metrics)
    cost = pipeline.status().tasks["main"].cost
    assert cost is not None
    assert cost.a_bytes == 1_000_000
    assert cost.kappa == pytest.approx(seen / 1_000_000, rel=0.1)
    assert cost.kappa > 10


def test_a_record_that_fits_no_batch_becomes_a_dead_letter_where_that_is_asked_for(
    make: Callable[..., Pipeline], tmp_path: Path
) -> None:
    write(tmp_path)
    budget_mb = (IDLE_BYTES >> 20) + 32
    pipeline = make(settings_for(tmp_path, length="bytes", memory_budget_mb=budget_mb, oversized="dead_letter"))
    outputs = pipeline.process([record(0), record(1, 4_000), record(2), record(3, 5_000)])
    assert [value["id"] for value in outputs.values] == [0, 2]
    assert [(it.cause, it.stage) for it in outputs.dead_letters] == [("too_large", "batch")] * 2
    assert "worker may hold" in outputs.dead_letters[0].message
    assert sum(it["failed"] for it in outputs.metrics if it["closed_by"] == "oversized") == 2


def test_a_worker_that_is_killed_for_memory_makes_batches_smaller(
    make: Callable[..., Pipeline], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One record takes memory until its worker is killed; the batch it was in says nothing of others, in the end."""
    pool = {"max_worker_memory_mb": 250}
    pipeline = make(settings_for(tmp_path, backend="Scripted", pool=pool, max_size=8))
    mark = str(tmp_path / "once")
    outputs = pipeline.process(
        [{"id": it, **({"do": "allocate", "once": mark} if it == 3 else {})} for it in range(40)]
    )
    assert [value["id"] for value in outputs.values] == list(range(40))
    assert any(
        "a batch of 8 records ran out of memory; from now on such a batch has at most 6" in it for it in caplog.messages
    )
    later = [it["records"] for it in outputs.metrics if it["attempts"] == 1]
    assert max(later) <= 8
    assert 6 in later
