"""The file of an estimate: a cost model with what it was measured on, as JSON beside the settings.

    {"version": 1, "length": "tokens", "fingerprint": {"backend": "inference:Encoder", "device": "cpu"},
     "time": {"alpha_ms": 5.0, "beta_ms": 0.02, "gamma_ms": 0.002, "delta_ms": 2e-06},
     "memory": {"a_bytes": 2e8, "b_bytes": 1e5, "c_bytes": 4e3, "d_bytes": 12.0}, "kappa": 1.1, "max_size": 64}

``fingerprint`` says what the model holds for; where it differs, so may the costs. ``memory`` is null where it was not
measured. ``measured`` says how it was; nothing is decided by it.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from streamproc.errors import EstimateError
from streamproc.runtime.cost import CostModel

Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TimeCoefficients(_Part):
    """α, β, γ and δ of ``CostModel``, in milliseconds."""

    alpha_ms: Coefficient
    beta_ms: Coefficient = 0.0
    gamma_ms: Coefficient = 0.0
    delta_ms: Coefficient = 0.0

    @model_validator(mode="after")
    def _something_takes_time(self) -> TimeCoefficients:
        if not any((self.alpha_ms, self.beta_ms, self.gamma_ms, self.delta_ms)):
            raise ValueError("a batch cannot take no time at all")
        return self


class MemoryCoefficients(_Part):
    """a, b, c and d of ``CostModel``, in bytes."""

    a_bytes: Coefficient = 0.0
    b_bytes: Coefficient = 0.0
    c_bytes: Coefficient = 0.0
    d_bytes: Coefficient = 0.0


class HeldOut(_Part):
    """Mean relative errors of predictions for shapes that nothing was fitted to; None where there was none."""

    shapes: int
    time: float | None
    memory: float | None
    """Of all that the process held."""
    memory_of_batch: float | None
    """Of what a batch added to what the idle process held."""


class AtLength(_Part):
    """What was found at one length."""

    length: int
    best_size: int
    """The least size that does as many records a second as any: argmax n/T(n, L)."""
    per_s: float
    """Records a second at that size."""
    largest: int
    """The largest size that was measured."""
    ended_by: Literal["size", "memory", "time"]
    cut: bool
    """Whether there was no sample of this length, and a longer one was cut."""


class Measurement(_Part):
    """How an estimate was made."""

    application: str
    task: str
    at: datetime
    memory: Literal["host", "cuda"]
    """Whose memory it is: that of the worker's process, or of the device."""
    idle_bytes: int
    """What the backend held before the first batch that was measured."""
    budget_bytes: int
    """What it was allowed to hold."""
    budget_source: str
    samples: int
    lengths: tuple[int, int]
    """The shortest and the longest; beyond, the model is only extended."""
    held_out: HeldOut
    at_lengths: list[AtLength]


class Estimate(_Part):
    """What was measured of a backend."""

    version: Literal[1] = 1
    """Of this format."""
    length: str | None
    """What lengths count, as the task's setting has it; null where records have none, and count as 1 long."""
    fingerprint: dict[str, str] = Field(default_factory=dict)
    """What it was measured on: backend, version, device, libraries."""
    time: TimeCoefficients
    memory: MemoryCoefficients | None = None
    kappa: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    """The factor on memory within which all held-out shapes were."""
    max_size: int | None = Field(default=None, ge=1)
    """More records in a batch were not worth while."""
    max_padded: int | None = Field(default=None, ge=1)
    """Neither was more padded length."""
    measured: Measurement | None = None

    @property
    def cost(self) -> CostModel:
        """The cost model."""
        memory = self.memory.model_dump() if self.memory is not None else {}
        return CostModel(**self.time.model_dump(), **memory)


def read_estimate(path: Path) -> Estimate:
    """The estimate of a file. Raises EstimateError."""
    try:
        return Estimate.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EstimateError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise EstimateError(
            f"{path}: {where or 'the file'}: {first['msg']}; it is no estimate, or not a whole one"
        ) from error


def write_estimate(path: Path, estimate: Estimate) -> None:
    """Write a file that ``read_estimate`` reads. Raises EstimateError."""
    try:
        path.write_text(estimate.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise EstimateError(f"{path}: cannot be written ({error.strerror})") from error
