"""What is learnt of a batch: its process's peak goes with the largest batch that the process ran."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

from streamproc.records import FIRST_GENERATION, Batch, Lease, Span, TopicPartition
from streamproc.runtime.executions import Executions
from streamproc.runtime.verdicts import Counts
from streamproc.settings import Settings

SETTINGS = Settings.model_validate({
    "name": "app",
    "backend": {"path": "a:B"},
    "tasks": {"main": {"input": {"topics": ["in"]}}},
})  # fmt: skip


def test_a_peak_is_held_against_the_largest_batch_that_its_process_ran() -> None:
    """It may be from that one, where peaks of batches cannot be told apart."""
    metrics, batcher = Mock(), Mock()
    batcher.cost.kappa = 2.0
    plan = cast("Any", SimpleNamespace(estimate=SimpleNamespace(measured=None)))
    executions = Executions(
        "main",
        SETTINGS,
        plan,
        metrics=metrics,
        counts=Counts(),
        tracing=None,
        clock=lambda: 0.0,
        wall_clock=lambda: 0.0,
    )
    span = Span(Lease(TopicPartition("in", 0), 1), 0, cast("Any", range(1)), [1], 0.0)
    batch = Batch(1, "main", [span], 0.0, closed_at=0.0, closed_by="wait", fill=1.0)
    batch.generation, batch.model_bytes = FIRST_GENERATION, 100.0
    reply = Mock(batch=batch, worker=0, wall_ms=1.0, decode_ms=0.0, encode_ms=0.0, metrics={})
    reply.peak_bytes, reply.peak_of, reply.model_bytes = 500.0, "host", 1_000.0
    executions.ran(reply, batcher, results=1, told=False)
    batcher.held.assert_called_once_with(1_000.0, 500.0)
    metrics.memory_over_predicted.observe.assert_called_once_with(0.25)
