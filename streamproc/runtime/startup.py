"""What a processor needs to know before it starts: the declared topics' schemas and samples, and the workers' setup."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import SecretStr

from streamproc.broker.topics import DeclaredTopic, load_topics
from streamproc.errors import SettingsError
from streamproc.observe.prediction import TaskInput
from streamproc.settings import HttpSettings, Settings, TaskSettings

log = logging.getLogger(__name__)

_PACKAGES = {"msgpack": "ormsgpack", "avro": "fastavro", "protobuf": "google.protobuf"}
_REGISTRY_FILES = {
    "password_file": "password_file",
    "token_file": "token_file",
    "ca_file": "ssl_ca_file",
    "cert_file": "ssl_cert_file",
    "key_file": "ssl_key_file",
}


def declared_topics(settings: Settings) -> dict[str, DeclaredTopic]:
    """The topics declared in ``topics_dir``; none where there is no such folder. Raises SettingsError."""
    return load_topics(settings.topics_dir) if settings.topics_dir.is_dir() else {}


def worker_setup(settings: Settings, declared: dict[str, DeclaredTopic]) -> dict[str, Any]:
    """What a worker is told at its start, ready for JSON: backend, tasks with schemas and warm-up records.

    Raises:
        SettingsError: a format needs a package that is not installed.
    """
    check_formats(settings)
    check_tracing(settings)
    return {
        "backend": backend_setup(settings),
        "tasks": {
            name: {
                "schemas": {
                    topic: declared[topic].schema_document
                    for topic in task.input.topics
                    if topic in declared and declared[topic].schema_document is not None
                },
                "envelope": task.output.envelope,
                "input_format": task.input.format,
                "output": output_setup(settings, name),
                "max_value_bytes": task.input.max_value_bytes,
                "warmup": [
                    sample for topic in task.input.topics if topic in declared for sample in declared[topic].samples
                ][: task.batch.max_size],
            }
            for name, task in settings.tasks.items()
        },
        "registry": registry_setup(settings),
        "shared_memory_threshold_bytes": settings.pool.shared_memory_threshold_bytes,
        "logging": settings.logging.model_dump(),
    }


def task_inputs(
    settings: Settings, declared: Mapping[str, DeclaredTopic], models: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, TaskInput]:
    """What is known of the records of each task: a request's are checked by the schema of its first topic.

    Where that has none, its ``models`` say what they look like: the schemas that the backend declares, as of
    ``Pool.declared``.
    """
    inputs: dict[str, TaskInput] = {}
    for name, task in settings.tasks.items():
        topic = declared.get(task.input.topics[0])
        model = (models or {}).get(name, {})
        inputs[name] = TaskInput(
            model.get("input") if topic is None or topic.schema_document is None else topic.schema_document,
            [] if topic is None else topic.samples,
            "" if topic is None else topic.description,
            model.get("output"),
        )
    return inputs


def http_token(http: HttpSettings) -> str | None:
    """What is good for all that the sidecar does, if anything. Raises SettingsError."""
    return _token(http.token, http.token_file, "http.token_file")


def predict_token(http: HttpSettings) -> str | None:
    """What is good for predictions alone, if anything. Raises SettingsError."""
    return _token(http.predict.token, http.predict.token_file, "http.predict.token_file")


def _token(told: SecretStr | None, file: Path | None, setting: str) -> str | None:
    if file is None:
        return None if told is None else told.get_secret_value()
    try:
        token = file.read_text().strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} cannot be read: {error}", setting=setting) from error
    if not token:
        raise SettingsError(f"{file} is empty", setting=setting, hint="put the token into it")
    return token


def measurer_setup(settings: Settings, workers: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the measuring process is told at its start, beside what the workers are; None where no task needs it."""
    lengths = {name: length_setup(task) for name, task in settings.tasks.items()}
    tasks = {name: length for name, length in lengths.items() if length is not None}
    if not tasks:
        return None
    asks_backend = any(it["of"] == "backend" for it in tasks.values())
    return {
        "backend": workers["backend"] if asks_backend else None,
        "tasks": tasks,
        "registry": workers["registry"],
        "logging": workers["logging"],
    }


def length_setup(task: TaskSettings) -> dict[str, Any] | None:
    """What the measuring process measures for a task, ready for JSON; None where it does not."""
    length = task.batch.length
    if length is None or length.of == "bytes":
        return None
    return {
        **length.model_dump(),
        "input_format": task.input.format,
        "max_value_bytes": task.input.max_value_bytes,
    }


def check_tracing(settings: Settings) -> None:
    """See that what spans need is installed, where there are to be some; nothing is imported. Raises SettingsError."""
    for module in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"):
        if settings.tracing.enabled and not _is_installed(module):
            raise SettingsError(
                f"traces need the package {module}, which is not installed",
                setting="tracing.enabled",
                hint="install streamproc[tracing]",
            )


def check_formats(settings: Settings) -> None:
    """See that what the tasks' formats need is installed; nothing is imported. Raises SettingsError."""
    for name, task in settings.tasks.items():
        for role, format_ in (("input", task.input.format), ("output", task.output.format)):
            if (needed := _PACKAGES.get(format_)) is not None and not _is_installed(needed):
                raise SettingsError(
                    f"{format_} needs the package {needed}, which is not installed",
                    setting=f"tasks.{name}.{role}.format",
                    hint="install streamproc[formats]",
                )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def output_setup(settings: Settings, task: str) -> dict[str, Any]:
    """How a task's results are written, ready for JSON."""
    output = settings.tasks[task].output
    return {
        "format": output.format,
        "subject": output.subject or f"{settings.topics_of(task).results}-value",
        "version": output.schema_version,
        "message": output.message,
        "backend_version": settings.backend.version,
    }


def registry_setup(settings: Settings) -> dict[str, Any] | None:
    """The arguments of ``formats.registry.Registry``, ready for JSON; None where there is none."""
    it = settings.schema_registry
    if it.url is None:
        return None
    secrets = {name: value.get_secret_value() for name in ("password", "token") if (value := getattr(it, name))}
    files = {
        ours: str(path.absolute())
        for ours, theirs in _REGISTRY_FILES.items()
        if (path := getattr(it, theirs)) is not None
    }
    return {"url": it.url, "username": it.username, "timeout_s": it.timeout_s, **secrets, **files}


def backend_setup(settings: Settings) -> dict[str, str]:
    """What ``load_backend`` needs, as text; the configuration as YAML, which keeps keys that are numbers, and dates.

    Raises:
        SettingsError: the configuration holds what YAML has no plain form for.
    """
    backend = settings.backend
    try:
        config = yaml.safe_dump(settings.backend_config())
    except yaml.YAMLError as error:
        raise SettingsError(
            f"it holds something that is no plain value: {error}",
            setting="backend.config",
            hint="use text, numbers, lists and mappings",
        ) from error
    return {
        "path": backend.path,
        "loader": backend.loader,
        "base_dir": str(backend.base_dir.absolute()),
        "config": config,
    }


def warn_of_open_secrets(settings: Settings) -> None:
    """Say so, once, where every user of the machine may read a file that holds a secret."""
    kafka, registry, http = settings.kafka, settings.schema_registry, settings.http
    files = {
        "kafka.sasl_password_file": kafka.sasl_password_file,
        "kafka.ssl_key_file": kafka.ssl_key_file,
        "schema_registry.password_file": registry.password_file,
        "schema_registry.token_file": registry.token_file,
        "schema_registry.ssl_key_file": registry.ssl_key_file,
        "http.token_file": http.token_file,
        "http.predict.token_file": http.predict.token_file,
        "http.tls_key_file": http.tls_key_file,
    }
    found = []
    for setting, path in files.items():
        with contextlib.suppress(OSError):  # whoever reads it says what is wrong
            if path is not None and path.stat().st_mode & stat.S_IROTH:
                found.append(f"{path} ({setting})")
    if found:
        log.warning("every user of this machine may read %s; take that away: chmod o-r", ", ".join(found))


def warn_of_memory(settings: Settings) -> None:
    """Say so when the shared memory that full batches may take is more than the machine has to give.

    Each worker has two segments each way; outputs are taken to be about as large as inputs.
    """
    largest = max(task.batch.max_bytes for task in settings.tasks.values())
    needed, available = 4 * settings.pool.workers * largest, psutil.virtual_memory().available
    if needed > available:
        log.warning(
            "%d workers with batches of up to %d MiB may take %d MiB of shared memory, and %d MiB are available; lower "
            "pool.workers or batch.max_bytes",
            *(settings.pool.workers, largest >> 20, needed >> 20, available >> 20),
        )
