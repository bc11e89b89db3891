"""The digits backend: which digit is on a handwritten image of 8 × 8 pixels?

A record is ``{"id": 17, "pixels": [64 numbers from 0 to 16], "label": 7}``; ``label`` is what the writer meant. It is
passed on, so that a reader of the results can compute the accuracy, and the model never sees it.

The images are the 1,797 that come with scikit-learn, and the demo streams exactly these. A model that had learned from
an image would answer it from memory, so there are two models: one for each half of the images, trained on the other.
The halves are the first and the last images, not the even and the odd ones, because neighbours are by the same hand:
so each model meets (but for the one at the border) writers whom it has never seen, and the accuracy is an honest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamproc import BackendConfig, InferenceBackend

IMAGES = 1_797
HALF = IMAGES // 2
MOST_INK = 16.0


class Config(BackendConfig):
    """What ``backend.config`` in the settings may say, beside the fields that every backend has."""

    components: int = 300
    """Training images that a new one is compared to; more is more accurate and slower."""


@dataclass(frozen=True, slots=True)
class Digits:
    """A batch between the steps: the records as they came, and what the models make of them."""

    records: list[dict[str, Any]]
    halves: NDArray[np.intp]
    values: NDArray[np.float64]


class Backend(InferenceBackend):
    """Tells digits apart with a kernel classifier, trained at start in a fraction of a second."""

    backend_config_model = Config
    config: Config

    def initialize(self) -> None:
        """Train both models: ``models[0]`` is for the first half of the images, and learned from the second."""
        images, labels = load_images()
        first = np.arange(len(labels)) < HALF
        self.models = [
            train(images[~first], labels[~first], self.config.components),
            train(images[first], labels[first], self.config.components),
        ]

    def transform_inputs(self, inputs: list[dict[str, Any]]) -> Digits:
        """The pixels of the batch as one array, brightness from 0 to 1."""
        pixels = np.array([record["pixels"] for record in inputs], dtype=np.float64) / MOST_INK
        return Digits(inputs, np.array([half_of(record) for record in inputs]), pixels)

    def execute(self, inputs: Digits) -> Digits:
        """The probability of each digit, by the model that has not seen the image."""
        probabilities = np.empty((len(inputs.records), 10))
        for half, model in enumerate(self.models):
            rows = inputs.halves == half
            if rows.any():
                probabilities[rows] = model.predict_proba(inputs.values[rows])
        return Digits(inputs.records, inputs.halves, probabilities)

    def transform_outputs(self, inputs: Digits) -> list[dict[str, Any]]:
        """One answer per record, in the order of the records."""
        digits = inputs.values.argmax(axis=1).tolist()
        probabilities = inputs.values.max(axis=1).round(4).tolist()
        return [
            {"id": record.get("id"), "label": record.get("label"), "digit": digit, "probability": probability}
            for record, digit, probability in zip(inputs.records, digits, probabilities, strict=True)
        ]


def half_of(record: Mapping[str, Any]) -> int:
    """The half that a record is from; an image of your own is in neither, and any model will do."""
    number = record.get("id")
    return 0 if isinstance(number, int) and number < HALF else 1


def train(images: NDArray[np.float64], labels: NDArray[np.int64], components: int) -> Any:
    """A kernel classifier, the same one on every run."""
    # Here and not above: the import takes a second, which a process that only wants the records need not pay.
    from sklearn.kernel_approximation import Nystroem  # noqa: PLC0415
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415

    kernel = Nystroem(gamma=0.3, n_components=min(components, len(labels)), random_state=0)
    return make_pipeline(kernel, LogisticRegression(C=100.0, max_iter=1_000)).fit(images / MOST_INK, labels)


def load_images() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The images, a row of 64 pixels from 0 to 16 each, and their labels."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - as in train()

    images, labels = load_digits(return_X_y=True)
    return images, labels


def sample_records() -> list[dict[str, Any]]:
    """All images as records, in the order of their ids."""
    images, labels = load_images()
    return [
        {"id": number, "pixels": pixels, "label": label}
        for number, (pixels, label) in enumerate(zip(images.astype(int).tolist(), labels.tolist(), strict=True))
    ]
