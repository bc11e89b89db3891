"""What a backend measured of its last call. Times are milliseconds; a step that the backend does not have is None."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, model_validator


class ExecutionTimes(BaseModel):
    """Milliseconds per step, in the order in which the steps run."""

    preprocess: float
    transform_inputs: float | None = None
    execute: float
    transform_outputs: float | None = None

    def total(self) -> float:
        """The sum over the steps that ran."""
        times = (self.preprocess, self.transform_inputs, self.execute, self.transform_outputs)
        return sum(time for time in times if time is not None)


class ExecutionMetrics(BaseModel):
    """One call's size and times. ``total_execution_time`` is always computed, whatever was passed for it."""

    batch_size: int
    execution_times: ExecutionTimes
    total_execution_time: float = 0.0

    @model_validator(mode="after")
    def _sum_up(self) -> Self:
        self.total_execution_time = self.execution_times.total()
        return self
