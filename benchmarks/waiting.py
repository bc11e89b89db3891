"""A backend that answers what it was asked after 20 ms: a model that computes elsewhere, on a device of its own."""

from __future__ import annotations

import time
from typing import Any

from streamproc import InferenceBackend

WAIT_S = 0.02


class Backend(InferenceBackend):
    """Identity, after a while."""

    def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The inputs."""
        time.sleep(WAIT_S)
        return inputs
