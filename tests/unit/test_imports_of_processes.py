"""What each process imports: a start is mostly imports, and what nobody uses is memory too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARENT = "import streamproc.cli.run, streamproc.settings_loading, streamproc.runtime.app"
SIDECAR = "import streamproc.observe.http, streamproc.observe.server"
WORKER = "import streamproc.runtime.worker"


def imported_by(code: str) -> set[str]:
    printed = f"{code}\nimport sys\nprint(*sys.modules)"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", printed], capture_output=True, text=True, env=environ, check=True)
    return set(done.stdout.split())


def test_the_parent_does_without_numpy_and_what_else_is_for_workers() -> None:
    its = imported_by(f"{PARENT}\n{SIDECAR}")
    assert (
        its & {"numpy", "pandas", "streamproc.backend", "streamproc.runtime.codec", "streamproc.runtime.worker"}
        == set()
    )
    assert "aiokafka" in its
    assert its & {"faust", "mode", "streamproc.stats", "streamproc.integrations"} == set()
    assert not [it for it in its if it.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))], "of an extra"


def test_the_parent_launches_workers_before_it_imports_the_sidecar() -> None:
    its = imported_by(PARENT)
    assert its & {"fastapi", "starlette", "uvicorn"} == set()
    assert "streamproc.runtime.worker_process" in its


@pytest.mark.parametrize(
    "module",
    [
        "aiokafka",
        "uvloop",
        "fastapi",
        "starlette",
        "uvicorn",
        "prometheus_client",
        "psutil",
        "typer",
        "rich",
        "opentelemetry",
    ],
)
def test_a_worker_imports_nothing_that_is_for_the_parent(module: str, worker: set[str]) -> None:
    assert module not in worker


@pytest.mark.parametrize("module", ["http.client", "ormsgpack", "fastavro", "google.protobuf"])
def test_a_worker_imports_what_a_format_needs_only_where_a_task_has_it(module: str, worker: set[str]) -> None:
    assert module not in worker


def test_a_worker_does_without_the_models_of_the_settings(worker: set[str]) -> None:
    assert worker & {"streamproc.settings", "streamproc.settings_loading"} == set()
    assert "streamproc.backend.pipeline" in worker


@pytest.fixture(scope="module")
def worker() -> set[str]:
    return imported_by(WORKER)
