"""The backend's errors under the path that packflow gives them.

``from packflow.exceptions import …`` becomes ``from streamproc.exceptions import …`` and nothing else changes.
The classes are those of ``streamproc.errors``, where the whole tree is drawn.
"""

from streamproc.errors import (
    InferenceBackendInitializationError,
    InferenceBackendLoadError,
    InferenceBackendRuntimeError,
    InferenceBackendValidationError,
    PreprocessorInitError,
    PreprocessorRuntimeError,
    UnknownPreprocessorError,
)

__all__ = [
    "InferenceBackendInitializationError",
    "InferenceBackendLoadError",
    "InferenceBackendRuntimeError",
    "InferenceBackendValidationError",
    "PreprocessorInitError",
    "PreprocessorRuntimeError",
    "UnknownPreprocessorError",
]
