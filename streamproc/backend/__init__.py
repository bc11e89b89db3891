"""What a user writes a backend with. Imports nothing of the runtime: a backend can be tested without Kafka."""

from streamproc.backend.base import InferenceBackend
from streamproc.backend.configuration import BackendConfig, InputFormats
from streamproc.backend.metrics import ExecutionMetrics, ExecutionTimes
from streamproc.backend.record_error import RecordError
from streamproc.backend.tasks import MultiTaskBackend, Task, resolve_task

__all__ = [
    "BackendConfig",
    "ExecutionMetrics",
    "ExecutionTimes",
    "InferenceBackend",
    "InputFormats",
    "MultiTaskBackend",
    "RecordError",
    "Task",
    "resolve_task",
]
