"""What is known of a task's batches before the first one: limits, estimate and memory budget, put together.

Settings come first. What they leave open the task's estimate says, if it has one: ``max_size``, ``max_padded``, what a
batch costs, and how much memory a worker may hold. There is one budget a worker, whatever tasks it runs: it runs one
batch at a time, and the model's weights are part of what each task's estimate predicts of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streamproc.runtime.estimate_file import Estimate, Measurement
from streamproc.runtime.estimates import FoundEstimate, find_estimate
from streamproc.runtime.memory_budget import Budget, budget_of, group_bytes, machine_bytes
from streamproc.runtime.online_cost import OnlineCost
from streamproc.runtime.worker_process import worker_environment
from streamproc.settings import BatchSettings, Settings

BUDGET_SHARE = 0.9
"""Of what a worker may hold: the rest is for what no estimate has seen."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How the batches of a task begin."""

    batch: BatchSettings
    """The task's, with what the estimate says where they leave it open."""
    estimate: Estimate | None = None
    path: Path | None = None
    """The estimate's file."""
    budget: Budget | None = None
    """Most memory of a worker while it runs a batch; None where nothing predicts that."""

    @property
    def memory_budget_bytes(self) -> int | None:
        """The budget's size."""
        return None if self.budget is None else self.budget.size_bytes

    def make_cost(self) -> OnlineCost | None:
        """The cost model to begin with: the estimate's, or a guess where predictions are of use."""
        if self.estimate is not None:
            return OnlineCost(self.estimate.cost, calibrated=True, kappa=self.estimate.kappa)
        return OnlineCost() if self.batch.predicts else None


def batch_plans(settings: Settings, environ: Mapping[str, str]) -> dict[str, BatchPlan]:
    """The plan of every task; says in the log which estimates are used, and what is wrong with one.

    Args:
        settings: The application's.
        environ: This process's environment.

    Raises:
        EstimateError: a file should be an estimate, and is none.
    """
    plans = {}
    for task in settings.tasks:
        found = find_estimate(settings, task, worker_environment(settings.pool, 0, environ))
        plans[task] = plan = plan_of(settings, task, found)
        if found is not None and found.warning:
            log.warning("%s", found.warning)
        if plan.estimate is not None:
            log.info("task %s: %s", task, described(plan))
        if plan.budget is not None and plan.estimate is not None:
            least_bytes = plan.estimate.kappa * plan.estimate.cost.memory_bytes(1, 0)
            if least_bytes > plan.budget.size_bytes:
                log.warning(
                    "task %s: a worker is predicted to hold %d MiB with the least batch, and the memory budget is "
                    "%d MiB (%s): no record fits it; raise the budget, or run `streamproc estimate --task %s` again",
                    *(task, int(least_bytes) >> 20, plan.budget.size_bytes >> 20, plan.budget.source, task),
                )
        if plan.budget is None and plan.batch.memory_budget_mb is not None:
            log.warning(
                "task %s: batch.memory_budget_mb limits nothing, since no estimate says what memory a batch takes; "
                "run `streamproc estimate --task %s`",
                *(task, task),
            )
    return plans


def plan_of(settings: Settings, task: str, found: FoundEstimate | None) -> BatchPlan:
    """The plan of a task, with the estimate that was found of it."""
    own = settings.tasks[task]
    estimate = None if found is None else found.estimate
    if found is None or estimate is None:
        return BatchPlan(own.batch)
    said, open_limits = own.batch.model_fields_set, dict[str, int]()
    if "max_size" not in said and estimate.max_size is not None:
        open_limits["max_size"] = min(estimate.max_size, own.limits.max_in_flight_records)
    if "max_padded" not in said and estimate.max_padded is not None and own.batch.length is not None:
        open_limits["max_padded"] = estimate.max_padded
    return BatchPlan(
        own.batch.model_copy(update=open_limits), estimate, found.path, _budget(settings, own.batch, estimate)
    )


def described(plan: BatchPlan) -> str:
    """An estimate that is used, in words."""
    batch = plan.batch
    limits = f"at most {batch.max_size} records" + (f" and {batch.max_padded} padded" if batch.max_padded else "")
    budget = f"{plan.budget.size_bytes >> 20} MiB, {plan.budget.source}" if plan.budget else "none"
    return f"estimate {plan.path}: a batch has {limits}; memory budget of a worker: {budget}"


def _budget(settings: Settings, batch: BatchSettings, estimate: Estimate) -> Budget | None:
    if estimate.memory is None:
        return None
    if batch.memory_budget_mb is not None:
        return Budget(batch.memory_budget_mb << 20, "batch.memory_budget_mb")
    whole = _whole(settings, estimate.measured)
    return Budget(
        int(whole.size_bytes * BUDGET_SHARE), f"{BUDGET_SHARE:.0%} of {whole.size_bytes >> 20} MiB, {whole.source}"
    )


def _whole(settings: Settings, measured: Measurement | None) -> Budget:
    """What a worker may hold: by the setting, or the less of what was found at the estimate and of what is here."""
    before = (
        None if measured is None else Budget(measured.budget_bytes, f"the estimate's budget ({measured.budget_source})")
    )
    if before is not None and measured is not None and measured.memory == "cuda":
        return before  # the host's limits say nothing of a device's memory
    killed_from_mb, workers = settings.pool.max_worker_memory_mb, settings.pool.workers
    here = budget_of(None, killed_from_mb, None, workers, group_bytes=group_bytes(), machine_bytes=machine_bytes())
    if before is None or killed_from_mb is not None or here.size_bytes < before.size_bytes:
        return here
    return before
