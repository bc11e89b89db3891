"""An identity backend that times the steps of the worker around it: CPU seconds of each, written to a file at the end.

The worker's own functions are wrapped while it starts, each by two readings of the process's CPU clock per batch.
"""

from __future__ import annotations

import atexit
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamproc import BackendConfig, InferenceBackend
from streamproc.runtime import worker

STEPS = {
    "receive": (worker, "read_frame"),
    "unpack": (worker, "decode_batch"),
    "decode": (worker, "decode"),
    "backend and metrics": (worker.TaskRunner, "_run_backend"),
    "encode": (worker.TaskRunner, "_encode"),
    "pack and send": (worker.Worker, "_reply"),
}
"""The steps of a batch in their order, and the functions that do them."""


class Config(BackendConfig):
    """Where the times go, and how many batches at the start are not counted."""

    steps_path: str
    skipped_batches: int


class Backend(InferenceBackend):
    """Identity."""

    backend_config_model = Config
    config: Config

    def initialize(self) -> None:
        """Wrap the steps."""
        self.batches = 0
        self.begun_s = 0.0
        self.taken_s = dict.fromkeys(STEPS, 0.0)
        for step, (owner, name) in STEPS.items():
            setattr(owner, name, self._timed(step, getattr(owner, name)))
        atexit.register(self._write)

    def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The inputs."""
        return inputs

    def _timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        last = list(STEPS)[-1]

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            begun = time.process_time()
            result = function(*arguments, **named)
            ended = time.process_time()
            self.taken_s[step] += ended - begun
            if step == last:
                self.batches += 1
                if self.batches == self.config.skipped_batches:
                    self.begun_s, self.taken_s = ended, dict.fromkeys(STEPS, 0.0)
                self.ended_s = ended
            return result

        return timed

    def _write(self) -> None:
        counted = self.batches - self.config.skipped_batches
        whole = {"batches": counted, "total_s": self.ended_s - self.begun_s, "steps_s": self.taken_s}
        Path(self.config.steps_path).write_text(json.dumps(whole))
