"""Corrects a cost model while it is used: time by what batches took, memory by a factor that rises at once.

Passive and deterministic: no clock, no chance, no I/O; a few microseconds a batch.

Time: least squares with forgetting (λ = 0.99 a batch, so about the last hundred count) on relative errors, kept in
information form, and solved by a sweep of coordinate descent a batch from the coefficients of before. No coefficient
gets negative, and one that was left out of the model (zero) stays out. The model that it began with keeps its weight:
where batches of one shape alone say nothing about a coefficient, it returns slowly to what it was. A guess only says
how its coefficients stand to each other: the first batch gives their scale.

Memory: κ is what predictions are multiplied by. It rises at once to what was seen over what was predicted, and decays
slowly to the factor of the calibration. What a worker holds is compared with the most that was predicted of any batch
that its process ran: an allocator keeps of a large batch what it then holds beside a small one. Where memory ran out
nothing was seen; what follows from that is for ``limits``.
"""

from __future__ import annotations

import math
from dataclasses import replace

from streamproc.runtime.cost import CostModel

FORGETTING = 0.99
PRIOR_WEIGHT = 0.05
"""The weight that the first model keeps, in batches out of the hundred or so that count."""
DECAY = 0.9999
"""A batch's part in κ's way back to its floor: half of it in 7,000 batches."""
LEAST = 1e-6
"""A coefficient never falls below this part of what it was at first."""
QUANTILE = 0.99
QUANTILE_STEP = 0.05
TRUSTED_FROM = 20
"""Batches seen from which on a model that began as a guess may delay or hasten a batch."""

GUESS = CostModel(alpha_ms=2.0, beta_ms=0.02, gamma_ms=0.002, delta_ms=1e-9)
"""Where nothing was measured yet: a batch costs as much as a thousand units of length."""


class OnlineCost:
    """A cost model that learns.

    Args:
        model: Where to begin.
        calibrated: Whether ``model`` was measured. A guess is not ``trusted`` before it has seen some batches.
        kappa: The calibration's factor on memory, at least 1: the floor of κ.
    """

    def __init__(self, model: CostModel = GUESS, *, calibrated: bool = False, kappa: float = 1.0) -> None:
        if not kappa >= 1:
            raise ValueError(f"kappa is {kappa}: it is at least 1, since memory is never less than was measured")
        self.model = model
        self.kappa = kappa
        self.floor = kappa
        """The calibration's."""
        self._seen = TRUSTED_FROM if calibrated else 0
        self._late_factor = 1.0
        first = (model.alpha_ms, model.beta_ms, model.gamma_ms, model.delta_ms)
        # Coefficients as multiples of where they began, so that all are of one size.
        self._terms = [it for it in range(4) if first[it] > 0]
        self._first = [first[it] for it in self._terms]
        self._now = [1.0] * len(self._terms)
        self._prior = 0.01 if calibrated else PRIOR_WEIGHT / 100
        self._products = [[0.0] * len(self._terms) for _ in self._terms]
        self._target = [0.0] * len(self._terms)
        for index in range(len(self._terms)):
            self._products[index][index] = self._target[index] = self._prior

    @property
    def trusted(self) -> bool:
        """Whether predictions are more than a guess."""
        return self._seen >= TRUSTED_FROM

    def observe_time(self, size: int, length: int, seen_ms: float) -> None:
        """A batch of ``size`` records, padded to ``length``, took so long."""
        if not (seen_ms > 0 and math.isfinite(seen_ms)):
            return
        if self._seen == 0:
            self._scale(seen_ms / self.model.time_ms(size, length))
        self._seen += 1
        late = seen_ms > self.late_ms(size, length)
        step = QUANTILE if late else QUANTILE - 1
        self._late_factor = max(1.0, self._late_factor * math.exp(QUANTILE_STEP * step))
        shape = (1.0, float(size), float(size) * length, float(size) * length * length)
        row = [shape[it] * first / seen_ms for it, first in zip(self._terms, self._first, strict=True)]
        keep = (1 - FORGETTING) * self._prior
        for index, (products, own) in enumerate(zip(self._products, row, strict=True)):
            for other, value in enumerate(row):
                products[other] = FORGETTING * products[other] + own * value
            products[index] += keep
            self._target[index] = FORGETTING * self._target[index] + own + keep
        self._solve()

    def observe_memory(self, model_bytes: float, seen_bytes: float) -> None:
        """A worker held so much at its peak, where ``model``, without κ, has so much for the largest that it ran."""
        decayed = self.floor + (self.kappa - self.floor) * DECAY
        self.kappa = max(decayed, seen_bytes / model_bytes) if model_bytes > 0 else decayed

    def memory_bytes(self, size: int, length: int) -> float:
        """The memory to expect, κ included."""
        return self.kappa * self.model.memory_bytes(size, length)

    def late_ms(self, size: int, length: int) -> float:
        """The time that all but one batch in a hundred stay within."""
        return self._late_factor * self.model.time_ms(size, length)

    def _scale(self, factor: float) -> None:
        """Multiply the model that it began with, as if it had begun with that."""
        self._first = [it * factor for it in self._first]
        self._solved()

    def _solve(self) -> None:
        """Two sweeps over the coefficients, each set to its best while the others stand; none below zero.

        None gets to zero either, so that every batch takes some time.
        """
        now = self._now
        for _ in range(2):
            for index, products in enumerate(self._products):
                rest = self._target[index] - sum(map(float.__mul__, products, now))
                now[index] = max(LEAST, now[index] + rest / products[index])
        self._solved()

    def _solved(self) -> None:
        found = [0.0] * 4
        for it, first, factor in zip(self._terms, self._first, self._now, strict=True):
            found[it] = first * factor
        alpha, beta, gamma, delta = found
        self.model = replace(self.model, alpha_ms=alpha, beta_ms=beta, gamma_ms=gamma, delta_ms=delta)
