"""packflow's project file, ``packflow.yaml``: where a project's backend is, how to configure it, in which environment.

Only what is needed to load a backend is acted upon; the descriptive fields are checked and kept. Invariant: whatever is
wrong with the file is an ``InferenceBackendLoadError`` that names the file, with the cause chained.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from streamproc.errors import InferenceBackendLoadError
from streamproc.logger import get_logger

PROJECT_FILE = "packflow.yaml"


class ProjectConfig(BaseModel):
    """The fields of ``packflow.yaml``; another is an error, as it is to packflow."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
    version: str = "0.1.0"
    description: str = ""
    maintainers: list[str] = []
    inference_backend: Annotated[str, StringConstraints(pattern=r"^[^:]+:[^:]+$")] = "inference:Backend"
    loader: Literal["local", "module"] = "local"
    python_version: str = ""
    env: dict[str, str] = {}
    backend_config: dict[str, Any] = {}
    extra: dict[str, Any] = {}


def read_project(directory: str | Path) -> ProjectConfig:
    """Read the project file of a directory.

    Raises:
        InferenceBackendLoadError: There is none, or it is not a valid one.
    """
    path = Path(directory).resolve() / PROJECT_FILE
    try:
        return ProjectConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise InferenceBackendLoadError(f"{path.parent} is no packflow project: it has no {PROJECT_FILE}") from error
    except OSError as error:
        raise InferenceBackendLoadError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InferenceBackendLoadError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'file'}: {each['msg']}" for each in error.errors())
        raise InferenceBackendLoadError(f"{path} is not a valid project file: {problems}") from error


def apply_environment(variables: Mapping[str, str]) -> None:
    """Set the project's environment variables; they win over what is set, with a warning."""
    for key, value in variables.items():
        present = os.environ.get(key)
        if present is not None and present != value:
            get_logger().warning("%s changes the environment variable %s, which was set otherwise", PROJECT_FILE, key)
        os.environ[key] = value
