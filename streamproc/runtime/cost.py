"""What a batch costs: its time and memory from the number of its records and the length that they are padded to.

Each record of a batch is padded to the longest. For n records and padded length L:

    time    T(n, L) = α + n·h(L),   h(L) = β + γ·L + δ·L²     milliseconds
    memory  M(n, L) = a + n·m(L),   m(L) = b + c·L + d·L²     bytes

No coefficient is negative. So both grow with n and with L: every part of a batch that fits fits too, and a batch may be
filled record by record without ever having to take one out again. The unit of a length is whatever the task measures
(tokens, characters, bytes); coefficients are per that unit.

Pure: no clock, no I/O. ``OnlineCost`` corrects a model while it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

KNEE_EPSILON = 0.05
"""A batch at the knee spends this share of its time on what a batch costs whatever is in it."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Coefficients of time and memory. Raises ValueError for a negative one, or where time costs nothing at all."""

    alpha_ms: float
    beta_ms: float = 0.0
    gamma_ms: float = 0.0
    delta_ms: float = 0.0
    a_bytes: float = 0.0
    b_bytes: float = 0.0
    c_bytes: float = 0.0
    d_bytes: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}: no coefficient may be negative")
        if not (self.alpha_ms or self.beta_ms or self.gamma_ms or self.delta_ms):
            raise ValueError("a batch cannot take no time at all: set one of alpha_ms, beta_ms, gamma_ms, delta_ms")

    def record_ms(self, length: int) -> float:
        """h(L): what one more record adds to a batch that is padded to this length."""
        return self.beta_ms + length * (self.gamma_ms + length * self.delta_ms)

    def time_ms(self, size: int, length: int) -> float:
        """T(n, L)."""
        return self.alpha_ms + size * self.record_ms(length)

    def record_bytes(self, length: int) -> float:
        """m(L): the memory that one more record takes."""
        return self.b_bytes + length * (self.c_bytes + length * self.d_bytes)

    def memory_bytes(self, size: int, length: int) -> float:
        """M(n, L)."""
        return self.a_bytes + size * self.record_bytes(length)

    def short_of_knee_ms(self, size: int, length: int, epsilon: float = KNEE_EPSILON) -> float:
        """How much more n·h(L) there has to be for the knee: n ≥ (α/h(L))·(1/ε - 1); 0 or less from there on.

        There α is the share ε of the whole, so that even an endless batch would save no more than that.
        """
        return self.alpha_ms * (1 / epsilon - 1) - size * self.record_ms(length)
