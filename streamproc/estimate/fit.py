"""From what batches took to the coefficients of a cost model, and how well it predicts others.

Errors are relative: a batch of 2 ms counts as much as one of 2 s. No coefficient is negative (``nnls``), see
``runtime.cost`` for why. Which terms there are is decided by cross-validation: parts of the shapes, whole lengths where
there are enough, are left out in turn and predicted from the others; of two choices that predict about as well, the one
with fewer terms is taken.

Pure: no clock, no I/O, no chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from streamproc.estimate.nnls import Vector, nnls

FOLDS = 5
LENGTHS_FOR_FOLDS = 4
"""From so many lengths on, whole lengths are left out."""
WORTH_A_TERM = 0.95
"""A further term has to bring the error below this part of what it is without."""
NEAR = 1.125
"""Lengths within this ratio are left out together."""
FLAT = 0.98
"""A size is as good as the best where its records a second are this part of the best's."""

TERMS = ("1", "n", "n·L", "n·L²")


@dataclass(frozen=True, slots=True)
class Seen:
    """What batches of one shape took: the median of their times, and the most memory that the process held."""

    size: int
    length: int
    """What each record was padded to, on average; 1 where records have no length."""
    time_ms: float
    peak_bytes: float

    @property
    def per_s(self) -> float:
        """Records a second."""
        return self.size / self.time_ms * 1_000


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients of ``TERMS`` in their order, zero for those left out, and the error of the cross-validation."""

    coefficients: tuple[float, float, float, float]
    error: float

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms that are there."""
        return tuple(name for name, it in zip(TERMS, self.coefficients, strict=True) if it > 0)

    def predict(self, size: int, length: int) -> float:
        """For a batch of this shape."""
        first, *others = self.coefficients
        return float(first + size * sum(it * length**power for power, it in enumerate(others)))


def fit(seen: Sequence[Seen], value: Callable[[Seen], float]) -> Fit:
    """Fit what ``value`` takes of each shape: its time, or its memory.

    Raises:
        ValueError: there is nothing to fit, or a value is not positive.
    """
    values = np.array([value(it) for it in seen], dtype=np.float64)
    if not values.size or not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError("a cost model needs shapes that were measured, with values above zero")
    shapes = np.array([[1.0, it.size, it.size * it.length, it.size * it.length**2] for it in seen])
    folds = _folds(seen)
    best: tuple[float, tuple[int, ...]] | None = None
    for terms in _choices(seen):
        error = _cross_validated(shapes, values, terms, folds)
        # Fewer terms come first, so that more of them have to be worth it.
        if best is None or error < (best[0] * WORTH_A_TERM if len(terms) > len(best[1]) else best[0]):
            best = (error, terms)
    assert best is not None  # noqa: S101 - there is a choice at least
    error, terms = best
    found = np.zeros(4)
    found[list(terms)] = _solved(shapes, values, terms)
    if not found.any():
        raise ValueError("no term of a cost model explains what was measured")
    first, second, third, fourth = found.tolist()
    return Fit((first, second, third, fourth), error)


def mean_error(fitted: Fit, seen: Sequence[Seen], value: Callable[[Seen], float]) -> float:
    """The mean of |predicted - seen| / seen."""
    return float(np.mean([abs(fitted.predict(it.size, it.length) - value(it)) / value(it) for it in seen]))


def kappa(memory: Fit, seen: Sequence[Seen]) -> float:
    """The least factor, at least 1, with which no shape needed more memory than predicted."""
    return max(1.0, *(it.peak_bytes / memory.predict(it.size, it.length) for it in seen))


def best_size(seen: Sequence[Seen]) -> int:
    """Of one length, the size that does most records a second, argmax n/T(n, L); of those about as good, the least."""
    most = max(it.per_s for it in seen)
    return min(it.size for it in seen if it.per_s >= FLAT * most)


def _choices(seen: Sequence[Seen]) -> list[tuple[int, ...]]:
    """Which terms there may be, fewer first: a constant, and what grows with the size and can be told apart."""
    lengths = len(set(_about(seen)))
    growing = range(1, 2 if lengths == 1 else 3 if lengths == 2 else 4)
    return [(0, *some) for count in range(len(growing) + 1) for some in combinations(growing, count)]


def _about(seen: Sequence[Seen]) -> list[int]:
    """Of each shape the number of its length, where lengths that are about the same count as one."""
    number: dict[int, int] = {}
    start = 0
    for length in sorted({it.length for it in seen}):
        if not number or length > start * NEAR:
            start = length
        number[length] = start
    order = sorted(set(number.values()))
    return [order.index(number[it.length]) for it in seen]


def _folds(seen: Sequence[Seen]) -> list[NDArray[np.bool_]]:
    """What is left out, in turn."""
    lengths = np.array(_about(seen))
    fold_of = (lengths if lengths.max() + 1 >= LENGTHS_FOR_FOLDS else np.arange(len(seen))) % FOLDS
    folds = [fold_of == fold for fold in sorted(set(fold_of.tolist()))]
    return folds if len(folds) > 1 else [np.ones(len(seen), dtype=np.bool_)]


def _cross_validated(
    shapes: Vector,
    values: Vector,
    terms: tuple[int, ...],
    folds: list[NDArray[np.bool_]],
) -> float:
    """The mean relative error of what is predicted from the other folds."""
    errors = []
    for left_out in folds:
        kept = left_out if left_out.all() else ~left_out
        predicted = shapes[left_out][:, list(terms)] @ _solved(shapes[kept], values[kept], terms)
        errors.append(np.abs(predicted - values[left_out]) / values[left_out])
    return float(np.concatenate(errors).mean())


def _solved(shapes: Vector, values: Vector, terms: tuple[int, ...]) -> Vector:
    return nnls(shapes[:, list(terms)] / values[:, None], np.ones(len(values)))
