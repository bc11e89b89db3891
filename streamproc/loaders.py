"""From a path such as ``inference:Backend`` to a backend that is ready to be called.

``LocalLoader`` reads a file below a directory, ``ModuleLoader`` imports an installed module, and both accept ours and
packflow's backends. Invariants: nothing depends on the working directory once a loader is made, and whatever is wrong
with the path, the code behind it or the object it names is an ``InferenceBackendLoadError`` with the cause chained.
What the backend's own construction raises is not: it says more.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from abc import ABC, abstractmethod
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from streamproc import errors
from streamproc.backend.pipeline import no_initialize
from streamproc.backend.project import apply_environment, read_project
from streamproc.backend.tasks import backend_bases, is_backend
from streamproc.errors import InferenceBackendLoadError
from streamproc.logger import get_logger


def load_backend(
    path: str, *, loader: str, base_dir: str | Path, config: dict[str, Any], initialize: bool = True
) -> Any:
    """The backend that the settings name: ``loader`` is ``local``, ``module`` or ``project``. Raises as ``load``.

    Without ``initialize`` that is not called: for what needs no weights.
    """
    found: InferenceBackendLoader
    if loader == "local":
        found = LocalLoader(path, base_dir=base_dir)
    elif loader == "module":
        found = ModuleLoader(path)
    else:
        found, config = _of_project(Path(base_dir, path), config)
    found.initialize = initialize
    return found.load(**config)


class InferenceBackendLoader(ABC):
    """Finds the object that a path names, and makes a backend of it.

    Attributes:
        initialize: Whether a backend's ``initialize()`` is called.
    """

    initialize = True

    def __init__(self, path: str) -> None:
        self.path = path

    @abstractmethod
    def load_backend_module(self) -> Any:
        """The object that the path names: a backend class or a backend. May raise anything."""

    def load(self, **backend_kwargs: Any) -> Any:
        """The backend: an instance of the class that the path names, or the instance itself.

        Returns:
            An ``InferenceBackend``, a ``MultiTaskBackend``, or packflow's ``InferenceBackend``, hence untyped.

        Raises:
            InferenceBackendLoadError: The path leads to no backend.
            InferenceBackendInitializationError: The backend's ``initialize()`` raised.
            PreprocessorInitError: The configuration does not suit its input format.
            pydantic.ValidationError: The configuration does not fit the backend's model.
        """
        try:
            found = self.load_backend_module()
        except Exception as error:
            reason = str(error) if isinstance(error, InferenceBackendLoadError) else f"{type(error).__name__}: {error}"
            raise InferenceBackendLoadError(f"the backend {self.path!r} cannot be loaded: {reason}") from error
        if isinstance(found, type) and issubclass(found, backend_bases()):
            return self._instantiate(found, backend_kwargs)
        if not is_backend(found):
            what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
            raise InferenceBackendLoadError(
                f"{self.path!r} is {what}, which is no backend; derive a class from streamproc.InferenceBackend"
            )
        if backend_kwargs:
            get_logger().warning("%r is an instance: the configuration it is given has no effect", self.path)
        return found

    def _instantiate(self, backend: type, backend_kwargs: dict[str, Any]) -> Any:
        if inspect.isabstract(backend):
            missing = ", ".join(f"{name}()" for name in sorted(getattr(backend, "__abstractmethods__", ())))
            raise InferenceBackendLoadError(f"the backend {self.path!r} does not define {missing}")
        try:
            return backend(**backend_kwargs) if self.initialize else _uninitialized(backend, backend_kwargs)
        except Exception as error:
            ours = getattr(errors, type(error).__name__, None)
            if type(error).__module__ == "packflow.exceptions" and isinstance(ours, type):
                # packflow's exceptions are not in our tree; our namesake is what the caller waits for.
                raise ours(str(error)) from error
            raise

    @classmethod
    def from_project(cls, project_path: str | Path = ".", **backend_kwargs: Any) -> Any:
        """The backend of a directory with a ``packflow.yaml``, its environment variables set.

        Args:
            project_path: The directory.
            **backend_kwargs: Over the file's ``backend_config``, key by key.
        """
        loader, config = _of_project(Path(project_path), backend_kwargs)
        return loader.load(**config)


class LocalLoader(InferenceBackendLoader):
    """Loads from a file: ``models.text:Backend`` is ``Backend`` in ``models/text.py`` below ``base_dir``.

    Modules beside the file, and below ``base_dir``, can be imported from it. The file is run anew at each load.
    """

    def __init__(self, path: str, base_dir: str | Path = ".") -> None:
        super().__init__(path)
        self.base_dir = Path(base_dir).resolve()

    def load_backend_module(self) -> Any:
        """The object, from the module made of the file."""
        module_name, object_name = _split(self.path)
        file = (self.base_dir / module_name.replace(".", "/")).with_suffix(".py")
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        # base_dir goes first: it is what dotted names count from.
        _make_importable(file.parent)
        _make_importable(self.base_dir)
        return _get(_run_file(module_name, file), object_name)


class ModuleLoader(InferenceBackendLoader):
    """Loads from an installed module: ``package.module:Backend``."""

    def load_backend_module(self) -> Any:
        """The object, from the module."""
        module_name, object_name = _split(self.path)
        return _get(importlib.import_module(module_name), object_name)


def _of_project(project_path: Path, config: dict[str, Any]) -> tuple[InferenceBackendLoader, dict[str, Any]]:
    """The loader that a project's file names, and its configuration below the one that is given."""
    directory = project_path.resolve()
    project = read_project(directory)
    apply_environment(project.env)
    _make_importable(directory)
    loader: InferenceBackendLoader
    if project.loader == "local":
        loader = LocalLoader(project.inference_backend, base_dir=directory)
    else:
        loader = ModuleLoader(project.inference_backend)
    return loader, {**project.backend_config, **config}


def _uninitialized(backend: Any, config: dict[str, Any]) -> Any:
    made = backend.__new__(backend)
    made.initialize = no_initialize  # its own goes before its class's, with packflow's base class too
    made.__init__(**config)
    return made


def _split(path: str) -> tuple[str, str]:
    module_name, colon, object_name = path.partition(":")
    if not (module_name and colon and object_name) or ":" in object_name:
        raise ValueError("the path must be a module and a name with exactly one colon between them")
    return module_name, object_name


def _get(module: ModuleType, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        raise AttributeError(f"{module.__file__ or module.__name__} has no {name!r}") from None


def _make_importable(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


class _FromSource(SourceFileLoader):
    """Runs what the file says now. The cache of bytecode would take two versions of one size and second for one."""

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 - the import system's signature
        return self.source_to_code(self.get_data(self.path), self.path)


def _run_file(module_name: str, file: Path) -> ModuleType:
    # A directory or file that is newer than the importer's view of it would not be found by the module's own imports.
    importlib.invalidate_caches()
    loader = _FromSource(module_name, str(file))
    spec = importlib.util.spec_from_file_location(module_name, file, loader=loader)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    previous = sys.modules.get(module_name)
    # Registered before it runs, as an import does: dataclasses and pickle look a class's module up.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if previous is None:
            del sys.modules[module_name]
        else:
            sys.modules[module_name] = previous
        raise
    return module
