"""One set of loaded weights, several tasks: a text and an image encoder, passages and queries.

    class Clip(MultiTaskBackend):
        def initialize(self) -> None:              # once per worker, for all tasks
            self.model = load()

        class Text(Task["Clip"]):                  # the task "text"
            backend_config = {"feature_names": ["text"]}

            def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
                return ensure_valid_output(self.backend.model.encode_text(inputs), "embedding")

        class Image(Task["Clip"]): ...             # the task "image"

Invariants: a task is called exactly as a plain backend is, and has its own configuration, preprocessor, steps and
metrics; the tasks are made before ``initialize()`` runs, so that a wrong setting is found before weights are loaded.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol

# Not typing's: the default, which lets `class Text(Task)` stand without brackets, is in 3.13 only. pydantic brings it.
from typing_extensions import TypeVar

from streamproc.backend.base import InferenceBackend
from streamproc.backend.configuration import BackendConfig, deep_merge, validate_configuration, with_file_overrides
from streamproc.backend.pipeline import Pipeline, run_initialize
from streamproc.errors import InferenceBackendLoadError
from streamproc.logger import get_logger

if TYPE_CHECKING:
    from streamproc.backend.metrics import ExecutionMetrics

B = TypeVar("B", bound="MultiTaskBackend", default=Any)


class TaskCallable(Protocol):
    """What the runtime asks of whatever serves a task: a plain backend, packflow's or ours, or a ``Task``."""

    def __call__(self, inputs: Any, /) -> Any:
        """Run a batch."""

    def get_metrics(self) -> ExecutionMetrics:
        """Size and times of the last call."""

    def ready(self) -> bool:
        """Whether batches may be sent."""

    def check_io(self, inputs: Any, /) -> Any:
        """Run sample records and check inputs and outputs."""


class Task(Pipeline, Generic[B]):
    """One task of a ``MultiTaskBackend``: the steps of an ``InferenceBackend``, with the weights in ``self.backend``.

    Attributes:
        name: The task's name in the settings; by default the class's own, ``ImageText`` giving ``image_text``.
        backend_config: This task's configuration, over the backend's and under the deployment's ``tasks.<name>``.
        backend_config_model: Validates it.
        input_model: Describes a record as it comes, in the documentation; it checks nothing.
        output_model: The same of a record's output.
        backend: The backend that the task belongs to.
        config: The validated configuration.
    """

    name: str = ""
    backend_config: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    backend_config_model: BackendConfig | type[BackendConfig] = BackendConfig

    def __init__(self, backend: B, name: str, values: Mapping[str, Any]) -> None:
        self.backend = backend
        self.name = name
        self._set_up(validate_configuration(self.backend_config_model, values))

    def ready(self) -> bool:
        """Whether batches of this task may be sent: by default, whether the backend is ready."""
        return self.backend.ready()


class MultiTaskBackend:
    """A backend whose tasks are the ``Task`` classes among its attributes, nested, assigned or inherited.

    Keyword arguments, and the file that ``BACKEND_CONFIG_FILE_PATH`` names, hold for every task, but for ``tasks``: a
    mapping from a task's name to what holds for that one. The nearer to the task, the stronger.

    Attributes:
        backend_config_model: Validates the shared configuration.
        config: The shared configuration, validated.
        logger: Where to log.
    """

    backend_config_model: BackendConfig | type[BackendConfig] = BackendConfig

    def __init__(self, **kwargs: Any) -> None:
        self.logger = get_logger()
        shared = with_file_overrides(kwargs)
        own = shared.pop("tasks", None) or {}
        self.config = validate_configuration(self.backend_config_model, shared)
        classes = _task_classes(type(self))
        _refuse_unknown(own, classes, f"the configuration of {type(self).__name__}")
        self._tasks = {
            name: task(self, name, deep_merge(deep_merge(shared, task.backend_config), own.get(name) or {}))
            for name, task in classes.items()
        }
        run_initialize(self, self.initialize)

    def initialize(self) -> None:
        """Load what the tasks share. Does nothing unless defined."""

    def ready(self) -> bool:
        """Whether batches may be sent, of any task."""
        return True

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the tasks, in the order of their definition."""
        return tuple(self._tasks)

    def task(self, name: str) -> Task[Any]:
        """The task of that name, to be called as a backend is.

        Raises:
            InferenceBackendLoadError: There is none.
        """
        _refuse_unknown([name], self._tasks, type(self).__name__)
        return self._tasks[name]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r}, tasks={list(self._tasks)})"


def resolve_task(backend: object, task_name: str) -> TaskCallable:
    """What serves a task: the backend's task of that name, or a plain backend itself, whatever the name.

    Raises:
        InferenceBackendLoadError: The backend has no such task, or is no backend.
    """
    if isinstance(backend, MultiTaskBackend):
        return backend.task(task_name)
    if is_backend(backend):
        return backend  # type: ignore[return-value]  # packflow's has the same methods, but no types
    raise InferenceBackendLoadError(
        f"the task {task_name!r} cannot be served by an object of type {type(backend).__name__}, which is no backend"
    )


def is_backend(obj: object) -> bool:
    """Whether ``obj`` is a backend: ours, plain or multi-task, or one on packflow's base class."""
    return isinstance(obj, backend_bases())


def backend_bases() -> tuple[type, ...]:
    """The base classes of backends. packflow's is among them if something has imported packflow; we never do."""
    theirs = getattr(sys.modules.get("packflow.backend.base"), "InferenceBackend", None)
    ours: tuple[type, ...] = (InferenceBackend, MultiTaskBackend)
    return (*ours, theirs) if isinstance(theirs, type) else ours


def _task_classes(backend: type[MultiTaskBackend]) -> dict[str, type[Task[Any]]]:
    attributes: dict[str, Any] = {}
    for base in reversed(backend.__mro__):
        attributes |= vars(base)
    tasks: dict[str, type[Task[Any]]] = {}
    for attribute, value in attributes.items():
        # A leading underscore marks a common base of several tasks.
        if attribute.startswith("_") or not (isinstance(value, type) and issubclass(value, Task)):
            continue
        name = value.name or _snake_case(attribute)
        if name in tasks:
            raise InferenceBackendLoadError(f"{backend.__name__} has two tasks named {name!r}; set Task.name on one")
        if inspect.isabstract(value):
            raise InferenceBackendLoadError(f"the task {name!r} of {backend.__name__} does not define execute()")
        tasks[name] = value
    if not tasks:
        raise InferenceBackendLoadError(f"{backend.__name__} has no tasks; nest a class derived from Task in it")
    return tasks


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _refuse_unknown(names: Mapping[str, Any] | list[str], known: Mapping[str, Any], place: str) -> None:
    for name in names:
        if name not in known:
            raise InferenceBackendLoadError(f"{place} has no task {name!r}; its tasks are: {', '.join(known)}")
