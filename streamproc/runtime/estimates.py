"""The estimate of a task: where its file is, and whether it was measured under the conditions of here and now.

``<estimates_dir>/<task>.estimate.json``, as ``streamproc estimate`` writes it (``estimate_file``). Under other
conditions it is still the best to begin with: the processor says what differs, uses it, and corrects it as it goes
(``online_cost``). Only where lengths are measured otherwise it is not used at all.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import orjson

from streamproc.runtime.estimate_file import Estimate, read_estimate
from streamproc.settings import Settings

NONE = "none"
_PACKAGE = "package "
_CPUS = Path("/proc/cpuinfo")
_GPUS = Path("/proc/driver/nvidia/gpus")


def estimate_path(settings: Settings, task: str) -> Path:
    """Where the estimate of a task is, if there is one."""
    return settings.estimates_dir / f"{task}.estimate.json"


@dataclass(frozen=True, slots=True)
class FoundEstimate:
    """The file of a task's estimate, and what came of it."""

    path: Path
    estimate: Estimate | None
    """None where lengths are measured otherwise now."""
    warning: str
    """One sentence: why it is not used, or which conditions differ; empty where there is nothing to say."""


def find_estimate(settings: Settings, task: str, environ: Mapping[str, str]) -> FoundEstimate | None:
    """The estimate of a task; None where there is no file.

    Args:
        settings: The application's.
        task: Its task.
        environ: A worker's environment (``worker_process.worker_environment``).

    Raises:
        EstimateError: there is a file, and it is no estimate.
    """
    path = estimate_path(settings, task)
    if not path.exists():
        return None
    found = read_estimate(path)
    length = settings.tasks[task].batch.length_text
    again = f"run `streamproc estimate --task {task}` again"
    if found.length != length:
        return FoundEstimate(
            path,
            None,
            f"{path} is not used: its lengths are {found.length or 'not measured'}, and those of task {task} are "
            f"{length or 'not measured'}; {again}",
        )
    packages = {name.removeprefix(_PACKAGE) for name in found.fingerprint if name.startswith(_PACKAGE)}
    here = fingerprint_of(settings, environ, {name: _version(name) for name in packages})
    differs = ", ".join(differences(found.fingerprint, here))
    return FoundEstimate(
        path, found, f"{path} was measured under other conditions ({differs}); {again}" if differs else ""
    )


def fingerprint_of(settings: Settings, environ: Mapping[str, str], packages: Mapping[str, str]) -> dict[str, str]:
    """What an estimate of a backend holds for.

    Args:
        settings: The application's.
        environ: A worker's environment.
        packages: What the backend brings, with versions.
    """
    backend = settings.backend
    options = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
    return {
        "backend": backend.path,
        "backend version": backend.version or NONE,
        # A digest: a configuration may hold what is secret.
        "backend configuration": hashlib.sha256(orjson.dumps(backend.config, str, options)).hexdigest()[:16],
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": environ.get("OMP_NUM_THREADS", NONE),
        "devices": ", ".join(_gpus()) or NONE,
        **{f"{_PACKAGE}{name}": packages[name] for name in sorted(packages)},
    }


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is not the same, in words. A fingerprint that lacks something says nothing of it."""
    return [
        f"{name.removeprefix(_PACKAGE)} {before[name]}, now {now.get(name, NONE)}"
        for name in before
        if before[name] != now.get(name, NONE)
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NONE


def _cpu() -> str:
    try:
        lines = _CPUS.read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    found = []
    for file in sorted(_GPUS.glob("*/information")):
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue  # a driver that tells only some users
        found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return found
