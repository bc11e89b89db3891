"""A backend that takes as long as a cost model says, and computes nothing: a model on a device of its own."""

from __future__ import annotations

import time
from typing import Any

from streamproc import InferenceBackend
from streamproc.runtime.cost import CostModel

COST = CostModel(alpha_ms=5.0, beta_ms=0.02, gamma_ms=0.002, delta_ms=0.000_002)
"""That of the simulation in ``benchmarks.batching``."""


class Backend(InferenceBackend):
    """Identity, after the time of a batch that is padded to its longest ``length``."""

    def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The records' ids."""
        time.sleep(COST.time_ms(len(inputs), max(record["length"] for record in inputs)) / 1_000)
        return [{"id": record["id"]} for record in inputs]
