"""How a task's batches begin: settings first, then what its estimate says."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest

from streamproc.runtime import batch_plan
from streamproc.runtime.batch_plan import batch_plans, described
from streamproc.runtime.estimate_file import (
    Estimate,
    HeldOut,
    Measurement,
    MemoryCoefficients,
    TimeCoefficients,
    write_estimate,
)
from streamproc.settings import BASE_DIR, Settings

MIB = 1 << 20


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 1,000 MiB, without a limit on the control group."""
    monkeypatch.setattr(batch_plan, "machine_bytes", lambda: 1_000 * MIB)
    monkeypatch.setattr(batch_plan, "group_bytes", lambda: None)


def settings(folder: Path, pool: dict[str, Any] | None = None, **batch: Any) -> Settings:
    return Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": "inference:Backend"},
            "pool": pool or {},
            "tasks": {"text": {"input": {"topics": ["in"]}, "batch": {"length": "bytes", **batch}}},
        },
        context={BASE_DIR: folder},
    )


def measured(budget_mb: int, memory: Literal["host", "cuda"] = "host") -> Measurement:
    return Measurement(
        application="app",
        task="text",
        at=datetime(2024, 5, 1, tzinfo=UTC),
        memory=memory,
        idle_bytes=0,
        budget_bytes=budget_mb * MIB,
        budget_source="RLIMIT_AS",
        samples=1,
        lengths=(1, 2),
        held_out=HeldOut(shapes=0, time=None, memory=None, memory_of_batch=None),
        at_lengths=[],
    )


def write(folder: Path, **fields: Any) -> None:
    estimate = Estimate.model_validate(
        {
            "length": "bytes",
            "time": TimeCoefficients(alpha_ms=3),
            "memory": MemoryCoefficients(a_bytes=100, c_bytes=2),
            "kappa": 1.5,
            "max_size": 48,
            "max_padded": 4_096,
            **fields,
        }
    )
    write_estimate(folder / "text.estimate.json", estimate)


def test_without_an_estimate_the_model_is_a_guess_and_nothing_limits_memory(tmp_path: Path) -> None:
    plan = batch_plans(settings(tmp_path), {})["text"]
    assert (plan.estimate, plan.budget, plan.batch.max_size) == (None, None, 64)
    cost = plan.make_cost()
    assert cost is not None
    assert not cost.trusted


def test_without_lengths_and_estimate_there_is_no_model(tmp_path: Path) -> None:
    assert batch_plans(settings(tmp_path, length=None), {})["text"].make_cost() is None


def test_the_estimate_says_what_the_settings_leave_open(tmp_path: Path) -> None:
    write(tmp_path)
    plan = batch_plans(settings(tmp_path), {})["text"]
    assert (plan.batch.max_size, plan.batch.max_padded) == (48, 4_096)
    cost = plan.make_cost()
    assert cost is not None
    assert (cost.trusted, cost.kappa, cost.model.alpha_ms, cost.model.c_bytes) == (True, 1.5, 3, 2)


def test_what_the_settings_say_stands(tmp_path: Path) -> None:
    write(tmp_path)
    plan = batch_plans(settings(tmp_path, max_size=64, max_padded=None), {})["text"]
    assert (plan.batch.max_size, plan.batch.max_padded) == (64, None)


def test_an_estimate_without_lengths_limits_no_padding(tmp_path: Path) -> None:
    write(tmp_path, length=None)
    plan = batch_plans(settings(tmp_path, length=None), {})["text"]
    assert (plan.batch.max_size, plan.batch.max_padded) == (48, None)
    assert plan.make_cost() is not None


@pytest.mark.parametrize(
    ("pool", "batch", "before_mb", "mb", "source"),
    [
        ({}, {}, 500, 450, "90% of 500 MiB, the estimate's budget (RLIMIT_AS)"),
        ({}, {}, 2_000, 720, "90% of 800 MiB, 80% of the machine's memory"),
        ({"workers": 2}, {}, 500, 360, "90% of 400 MiB, 80% of the machine's memory by 2 workers"),
        ({"max_worker_memory_mb": 700}, {}, 500, 630, "90% of 700 MiB, pool.max_worker_memory_mb"),
        ({"max_worker_memory_mb": 700}, {"memory_budget_mb": 600}, 500, 600, "batch.memory_budget_mb"),
    ],
)
def test_the_budget_is_the_setting_or_nine_tenths_of_what_a_worker_may_hold(
    tmp_path: Path, *, pool: dict[str, Any], batch: dict[str, Any], before_mb: int, mb: int, source: str
) -> None:
    write(tmp_path, measured=measured(before_mb))
    budget = batch_plans(settings(tmp_path, pool, **batch), {})["text"].budget
    assert budget is not None
    assert (budget.size_bytes, budget.source) == (mb * MIB, source)


def test_a_devices_budget_is_not_the_hosts(tmp_path: Path) -> None:
    write(tmp_path, measured=measured(20_000, "cuda"))
    budget = batch_plans(settings(tmp_path, {"max_worker_memory_mb": 700}), {})["text"].budget
    assert budget is not None
    assert budget.size_bytes == 18_000 * MIB


def test_a_budget_that_nothing_can_keep_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, memory=None)
    plan = batch_plans(settings(tmp_path, memory_budget_mb=100), {})["text"]
    assert plan.budget is None
    assert "batch.memory_budget_mb limits nothing" in caplog.text
    assert "run `streamproc estimate --task text`" in caplog.text


def test_a_model_that_leaves_no_room_for_a_batch_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, memory=MemoryCoefficients(a_bytes=100 * MIB))
    batch_plans(settings(tmp_path, memory_budget_mb=120), {})
    assert (
        "to hold 150 MiB with the least batch, and the memory budget is 120 MiB (batch.memory_budget_mb)" in caplog.text
    )


def test_the_log_says_which_estimate_is_used_and_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, fingerprint={"backend": "other:Backend"})
    with caplog.at_level(logging.INFO):
        plan = batch_plans(settings(tmp_path), {})["text"]
    assert f"task text: {described(plan)}" in caplog.messages
    assert any("backend other:Backend, now inference:Backend" in it for it in caplog.messages)


def test_lengths_of_another_kind_leave_all_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, length="tokens")
    plan = batch_plans(settings(tmp_path), {})["text"]
    assert (plan.estimate, plan.batch.max_size, plan.budget) == (None, 64, None)
    assert "is not used: its lengths are tokens" in caplog.text
