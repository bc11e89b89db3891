"""The base class of a user's backend.

    class Backend(InferenceBackend):
        def initialize(self) -> None:
            self.model = load()

        def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{"label": self.model(record["text"])} for record in inputs]

Invariants: a class written against packflow's ``InferenceBackend`` gives the same outputs on this one, and the same
exceptions by name; ``initialize()`` runs once, last in the construction, with configuration and logger in place.
"""

from __future__ import annotations

from typing import Any

from streamproc.backend.configuration import BackendConfig, load_backend_configuration
from streamproc.backend.pipeline import Pipeline, run_initialize


class InferenceBackend(Pipeline):
    """Inference code with its steps: ``transform_inputs`` and ``transform_outputs`` are optional, ``execute`` is not.

    Attributes:
        backend_config_model: Validates the keyword arguments; set it to a ``BackendConfig`` subclass for more fields.
        input_model: Describes a record as it comes, in the documentation; it checks nothing.
        output_model: The same of a record's output.
        config: The validated configuration.
        logger: Where to log.
    """

    backend_config_model: BackendConfig | type[BackendConfig] = BackendConfig

    def __init__(self, **kwargs: Any) -> None:
        self._set_up(load_backend_configuration(self.backend_config_model, **kwargs))
        run_initialize(self, self.initialize)

    def initialize(self) -> None:
        """Load the model and whatever else takes long. Does nothing unless defined."""
