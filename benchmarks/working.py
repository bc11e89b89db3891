"""The backends of `benchmarks.throughput` that do something: what the peers do in ``benchmarks.peers.work``."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from streamproc import InferenceBackend

MODEL_S = 0.005


class Doubling(InferenceBackend):
    """Twice the numbers of each record, through one array."""

    def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The records with their numbers doubled."""
        doubled = np.array([record["values"] for record in inputs]) * 2
        return [{"id": record["id"], "values": row} for record, row in zip(inputs, doubled, strict=True)]


class FiveMilliseconds(InferenceBackend):
    """A model that takes 5 ms for a batch of any size."""

    def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The inputs, later."""
        time.sleep(MODEL_S)
        return inputs
