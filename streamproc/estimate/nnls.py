"""Least squares with coefficients that are not negative: the active-set method of Lawson and Hanson.

The problem is convex, and a solution is known by its gradient g = Aᵀ(b - Ax): zero where x is positive, not positive
where x is zero. Columns are scaled to one length first, so that "zero" means the same for each of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

TOLERANCE = 1e-10


def nnls(matrix: Vector, target: Vector) -> Vector:
    """The x ≥ 0 for which ‖matrix·x - target‖ is least; of columns that repeat each other, one takes it all.

    Raises:
        ValueError: something is not finite, or rows and targets are not as many.
    """
    if matrix.ndim != 2 or target.shape != matrix.shape[:1]:
        raise ValueError(f"a matrix of shape {matrix.shape} does not go with a target of shape {target.shape}")
    if not (np.isfinite(matrix).all() and np.isfinite(target).all()):
        raise ValueError("the matrix or the target holds a number that is not finite")
    scale = np.linalg.norm(matrix, axis=0)
    a = matrix / np.where(scale > 0, scale, 1.0)
    x, passive = np.zeros(a.shape[1]), np.zeros(a.shape[1], dtype=bool)
    least_gain = TOLERANCE * max(float(np.linalg.norm(target)), np.finfo(float).tiny)
    # Each round adds a column for good or drops some; far fewer are needed than there are sets of columns.
    for _ in range(2 ** min(a.shape[1], 16)):
        gradient = a.T @ (target - a @ x)
        gradient[passive] = -np.inf
        entering = int(gradient.argmax()) if gradient.size else 0
        if not gradient.size or gradient[entering] <= least_gain:
            break
        passive[entering] = True
        x = _without_negatives(a, target, x, passive)
    return np.where(scale > 0, x / np.where(scale > 0, scale, 1.0), 0.0)


def _without_negatives(a: Vector, target: Vector, x: Vector, passive: NDArray[np.bool_]) -> Vector:
    """The least squares of the passive columns; those that would get negative leave ``passive``."""
    while passive.any():
        best = np.zeros_like(x)
        best[passive] = np.linalg.lstsq(a[:, passive], target, rcond=None)[0]
        if (best[passive] > 0).all():
            return best
        # As far towards the best as no coefficient gets negative; those that stop it leave.
        wrong = passive & (best <= 0)
        steps = x[wrong] / np.maximum(x[wrong] - best[wrong], np.finfo(float).tiny)
        x = x + steps.min() * (best - x)
        passive &= x > TOLERANCE * max(float(np.abs(x).max()), np.finfo(float).tiny)
        x = np.where(passive, x, 0.0)
    return np.zeros_like(x)
