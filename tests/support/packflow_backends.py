"""A backend as somebody wrote it for packflow, before there was streamproc: it imports nothing of ours."""

import numpy as np
from packflow import InferenceBackend
from packflow.backend.configuration import BackendConfig
from packflow.utils.normalize import ensure_valid_output


class Config(BackendConfig):  # type: ignore[misc]  # packflow ships no types
    """With a field of its own."""

    factor: int = 2


class Doubled(InferenceBackend):  # type: ignore[misc]  # as above
    """Multiplies an array of features."""

    backend_config_model = Config

    def initialize(self) -> None:
        """Log as packflow's loggers do."""
        self.logger.info("Multiplying by {}", self.config.factor)  # noqa: PLE1205 - loguru's way
        self.factor = np.int64(self.config.factor)

    def execute(self, inputs):  # type: ignore[no-untyped-def]  # as a user writes it
        """Rows of features times the factor."""
        if (inputs < 0).any():
            raise ValueError("a negative value")
        return inputs * self.factor

    def transform_outputs(self, inputs):  # type: ignore[no-untyped-def]  # as a user writes it
        """One dict per row."""
        return ensure_valid_output(inputs, parent_key="doubled")
