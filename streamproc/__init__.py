"""streamproc: a Kafka stream processor for model inference.

The public names are those in ``__all__``. They are imported when they are first used, so that a command that needs
none of them starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamproc.backend import BackendConfig, InferenceBackend, RecordError
    from streamproc.backend.metrics import ExecutionMetrics, ExecutionTimes
    from streamproc.backend.tasks import MultiTaskBackend, Task
    from streamproc.errors import StreamprocError
    from streamproc.loaders import LocalLoader, ModuleLoader
    from streamproc.settings import Settings
    from streamproc.settings_loading import load_settings

__all__ = [
    "BackendConfig",
    "ExecutionMetrics",
    "ExecutionTimes",
    "InferenceBackend",
    "LocalLoader",
    "ModuleLoader",
    "MultiTaskBackend",
    "RecordError",
    "Settings",
    "StreamprocError",
    "Task",
    "load_settings",
]

_HOME = {
    "BackendConfig": "streamproc.backend",
    "ExecutionMetrics": "streamproc.backend.metrics",
    "ExecutionTimes": "streamproc.backend.metrics",
    "InferenceBackend": "streamproc.backend",
    "LocalLoader": "streamproc.loaders",
    "ModuleLoader": "streamproc.loaders",
    "MultiTaskBackend": "streamproc.backend.tasks",
    "RecordError": "streamproc.backend",
    "Settings": "streamproc.settings",
    "StreamprocError": "streamproc.errors",
    "Task": "streamproc.backend.tasks",
    "load_settings": "streamproc.settings_loading",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
