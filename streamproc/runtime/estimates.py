"""Estimates: what ``streamproc estimate`` measured of a task's batches, as a file beside the settings.

``<estimates_dir>/<task>.estimate.json`` has the coefficients of a cost model (``runtime.cost``) and what they hold for:
the fingerprint of backend, libraries and machine. Elsewhere they are only somewhere to begin; the processor says so,
uses them all the same and corrects them as it goes (``runtime.online_cost``). Lengths that are measured otherwise are
another matter: such an estimate is not used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from streamproc.errors import SettingsError
from streamproc.runtime.cost import CostModel
from streamproc.runtime.online_cost import OnlineCost
from streamproc.settings import Settings

log = logging.getLogger(__name__)

_CPUS = Path("/proc/cpuinfo")
_GPUS = Path("/proc/driver/nvidia/gpus")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fingerprint(_Part):
    """What an estimate holds for."""

    backend: str
    """The settings' ``backend.path``."""
    backend_version: str | None
    backend_config: str
    """A digest of the settings' ``backend.config``, which may hold what is secret."""
    libraries: dict[str, str]
    """The packages that the backend brings, and their versions."""
    python: str
    cpu: str
    cpus: int
    threads: str
    """Of a worker: OMP_NUM_THREADS."""
    devices: list[str]
    """GPUs of the machine."""

    @classmethod
    def of(cls, settings: Settings, environ: Mapping[str, str], libraries: Mapping[str, str]) -> Self:
        """That of these settings here and now; ``environ`` is a worker's."""
        config = orjson.dumps(
            settings.backend.config, default=str, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
        )
        return cls(
            backend=settings.backend.path,
            backend_version=settings.backend.version,
            backend_config=hashlib.sha256(config).hexdigest()[:16],
            libraries=dict(libraries),
            python=platform.python_version(),
            cpu=_cpu(),
            cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            threads=environ.get("OMP_NUM_THREADS", ""),
            devices=_gpus(),
        )

    def differences(self, other: Fingerprint) -> list[str]:
        """What is not the same, in words: this one's, then the other's."""
        found = [
            f"{name} {mine} → {theirs}"
            for name in type(self).model_fields
            if name != "libraries" and (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]
        for name in sorted({*self.libraries, *other.libraries}):
            before, after = (it.libraries.get(name, "none") for it in (self, other))
            if before != after:
                found.append(f"{name} {before} → {after}")
        return found


class Errors(_Part):
    """Mean relative errors of predictions for shapes that were held out; None where none was measured."""

    time: float | None
    memory: float | None
    """Of all that the process holds."""
    memory_of_batch: float | None
    """Of what a batch adds to what the idle process holds."""
    shapes: int


class BestSize(_Part):
    """Of records of one length, how many at a time do most a second, and how many fitted."""

    length: int
    size: int
    per_s: float
    largest: int
    ended_by: Literal["size", "memory", "time"]
    cut: bool


class Estimate(_Part):
    """A task's cost model, and where it is from."""

    format: Literal[1] = 1
    application: str
    task: str
    made_at: datetime
    length: str | None
    """The task's ``batch.length``: the unit of all lengths here."""
    memory: Literal["host", "cuda"]
    idle_bytes: int
    budget_bytes: int
    """What a worker was allowed to hold while this was measured."""
    budget_source: str
    alpha_ms: float = Field(ge=0)
    beta_ms: float = Field(ge=0)
    gamma_ms: float = Field(ge=0)
    delta_ms: float = Field(ge=0)
    a_bytes: float = Field(ge=0)
    b_bytes: float = Field(ge=0)
    c_bytes: float = Field(ge=0)
    d_bytes: float = Field(ge=0)
    kappa: float = Field(ge=1)
    max_size: int = Field(ge=1)
    """More records at a time bring no more a second, at any length."""
    max_padded: int | None
    """Neither does more padded length; None where records have no length."""
    lengths: tuple[int, int]
    """What was measured; beyond, the model is only extended."""
    sizes: tuple[int, int]
    errors: Errors
    best: list[BestSize]
    fingerprint: Fingerprint

    @property
    def model(self) -> CostModel:
        """The cost model."""
        return CostModel(**{name: getattr(self, name) for name in CostModel.__dataclass_fields__})

    def online(self) -> OnlineCost:
        """The cost model as a batcher uses it, corrected as it goes."""
        return OnlineCost(self.model, calibrated=True, kappa=self.kappa)

    def as_json(self) -> bytes:
        """The file's content."""
        return orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def estimate_path(settings: Settings, task: str) -> Path:
    """Where the estimate of a task is, if there is one."""
    return settings.estimates_dir / f"{task}.estimate.json"


def load_estimate(settings: Settings, task: str, environ: Mapping[str, str]) -> Estimate | None:
    """The estimate of a task; None where there is none for lengths as they are measured now. Warns of what differs.

    Args:
        settings: The application's.
        task: Its task.
        environ: A worker's environment (``worker_process.worker_environment``).

    Raises:
        SettingsError: there is a file, and it is no estimate.
    """
    path = estimate_path(settings, task)
    again = f"run `streamproc estimate --task {task}` again"
    try:
        found = Estimate.model_validate(orjson.loads(path.read_bytes()))
        found.model  # noqa: B018 - refuses a model in which batches take no time
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError(f"cannot be read ({error.strerror})", place=str(path), hint="mend its rights") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SettingsError(f"is no estimate: {where}: {first['msg']}", place=str(path), hint=again) from error
    except ValueError as error:
        raise SettingsError(f"is no estimate: {error}", place=str(path), hint=again) from error
    length = settings.tasks[task].batch.length
    if found.length != length:
        log.warning(
            "%s is not used: it goes by lengths in %s, and task %s measures %s; %s",
            *(path, found.length or "nothing", task, length or "nothing", again),
        )
        return None
    here = Fingerprint.of(settings, environ, {name: _version(name) for name in found.fingerprint.libraries})
    if differences := found.fingerprint.differences(here):
        log.warning("%s was measured under other conditions (%s); %s", path, ", ".join(differences), again)
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu() -> str:
    try:
        lines = _CPUS.read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    found = []
    for file in sorted(_GPUS.glob("*/information")):
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue
        found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return found
