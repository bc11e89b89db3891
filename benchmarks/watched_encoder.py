"""The encoder of ``examples/sentences`` with a diary: which records each batch had, and from when to when it ran.

For ``benchmarks.encoder``: all its contestants run this backend. The example's folder has to be importable.
"""

from __future__ import annotations

import time
from typing import Any

import inference  # type: ignore[import-not-found]  # the example's
import orjson


class Config(inference.Config):  # type: ignore[misc]  # as above
    """Where the diary goes."""

    diary: str


class Backend(inference.Backend):  # type: ignore[misc]  # as above
    """A vector for each text."""

    backend_config_model = Config
    config: Config

    def initialize(self) -> None:
        """Load the weights, and open the diary."""
        super().initialize()
        self.diary = open(self.config.diary, "ab", buffering=0)  # noqa: SIM115, PTH123 - open as long as the process is

    def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As the example, and a line in the diary."""
        begun_s = time.monotonic()
        outputs: list[dict[str, Any]] = super().execute(inputs)
        line = {"ids": [int(it["id"]) for it in inputs], "begun_s": begun_s, "ended_s": time.monotonic()}
        self.diary.write(orjson.dumps(line) + b"\n")
        return outputs
