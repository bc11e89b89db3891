from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

GOOD = """
from typing import Any

import numpy as np

from streamproc.backend import BackendConfig, InferenceBackend, MultiTaskBackend, RecordError, Task, resolve_task
from streamproc.loaders import LocalLoader
from streamproc.utils.normalize import ensure_valid_output


class Config(BackendConfig):
    threshold: float = 0.5


class Backend(InferenceBackend):
    backend_config_model = Config
    config: Config

    def initialize(self) -> None:
        self.weights = np.zeros(3)
        self.logger.info("ready")

    def transform_inputs(self, rows: list[dict[str, Any]]) -> list[float]:
        return [float(row["x"]) for row in rows]

    def execute(self, numbers: list[float]) -> list[bool]:
        return [number > self.config.threshold for number in numbers]

    def transform_outputs(self, outputs: list[bool]) -> list[dict[str, Any] | RecordError]:
        return [{"above": output} if output else RecordError("below") for output in outputs]


class Records(InferenceBackend):
    def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return ensure_valid_output(inputs)


class Clip(MultiTaskBackend):
    def initialize(self) -> None:
        self.scale = 2

    class Text(Task["Clip"]):
        backend_config = {"feature_names": ["text"]}

        def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            reveal_type(self.backend.scale)
            return inputs

    class Image(Task):
        def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return inputs


backend = Backend(threshold=0.7)
reveal_type(backend.get_metrics().execution_times.transform_inputs)
reveal_type(backend.config.threshold)
reveal_type(Clip().task_names)
outputs: list[dict[str, Any]] = backend([{"x": 1}])
resolve_task(LocalLoader("inference:Backend").load(), "text")([{"x": 1}])
"""

BAD = """
from typing import Any

from streamproc.backend import InferenceBackend, RecordError


class Backend(InferenceBackend):
    def initialize(self, path: str) -> None: ...
    def execute(self, inputs: list[dict[str, Any]], more: int) -> Any: ...


RecordError(5)
Backend()("text")
"""


def mypy(tmp_path: Path, source: str) -> str:
    file = tmp_path / "users_backend.py"
    file.write_text(source)
    options = ["--strict", "--no-error-summary", "--hide-error-context", "--no-incremental", "--config-file="]
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(file)],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not ended.stderr
    return ended.stdout


@pytest.mark.skipif(not (ROOT / "streamproc" / "py.typed").exists(), reason="types are for a checkout with py.typed")
def test_a_typed_backend_passes_mypy_in_strict_mode_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    told = mypy(tmp_path, GOOD)
    assert "error" not in told
    revealed = [
        line.partition("Revealed type is ")[2].strip('"').replace("builtins.", "") for line in told.splitlines()
    ]
    assert revealed == [
        "int",
        "float | None",
        "float",
        "tuple[str, ...]",
    ]
    wrong = mypy(tmp_path, BAD)
    lines = [int(line.split(":")[1]) for line in wrong.splitlines() if ": error:" in line]
    assert sorted(set(lines)) == [8, 9, 12, 13], wrong
