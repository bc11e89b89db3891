"""A backend that answers what it was asked after it has computed for 5 ms a batch: a worker that is busy."""

from __future__ import annotations

import time
from typing import Any

from streamproc import InferenceBackend

BUSY_S = 0.005


class Backend(InferenceBackend):
    """Identity, after a while of work."""

    def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The inputs."""
        until = time.thread_time() + BUSY_S
        while time.thread_time() < until:
            pass
        return inputs
