"""Two tasks, one set of weights: images of digits and words for digits, encoded into one space.

    image    {"id": "image-1500", "image": {"pixels": [64 numbers from 0 to 16], "width": 8, "height": 8}}
    text     {"id": "text-2", "text": "quatre"}
    both  ─► {"id": …, "digit": 4, "similarity": 0.998, "vector": [9 numbers]}

Each task is a stream of its own, with its own topics, batches, preprocessing and metrics. A worker process holds the
encoders once and serves both. The vectors of a word and of an image can be compared with each other: that is the point
of encoding them with one backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from encoders import Vectors, train  # type: ignore[import-not-found]  # the file beside this one

from streamproc import BackendConfig, MultiTaskBackend, Task

Record = dict[str, Any]


class Config(BackendConfig):
    """What ``backend.config`` may say for both tasks, or ``backend.config.tasks.<task>`` for one."""

    min_similarity: float = 0.7
    """Below this, nothing is near enough to be called a digit."""
    decimals: int = 4
    """Of the vectors' numbers: fewer make smaller results."""


class Encoded(NamedTuple):
    """A batch after ``execute``: the records that came, and a vector for each."""

    records: list[Record]
    vectors: Vectors


class _Encoding(Task["Backend"]):
    """What both tasks have in common: each has its own way into the space, and from there on they are alike."""

    backend_config_model = Config
    config: Config

    def transform_outputs(self, outputs: Encoded) -> list[Record]:
        """The nearest digit to each vector, and the vector."""
        records, vectors = outputs
        digits, similarities = self.backend.encoders.nearest_digits(vectors)
        return [
            {
                "id": record.get("id"),
                "label": record.get("label"),
                "digit": digit if similarity >= self.config.min_similarity else None,
                "similarity": similarity,
                "vector": vector,
            }
            for record, digit, similarity, vector in zip(
                records, digits, similarities, vectors.round(self.config.decimals).tolist(), strict=True
            )
        ]


class Backend(MultiTaskBackend):
    """The encoders, loaded once per worker, and the two tasks that they serve."""

    backend_config_model = Config

    def initialize(self) -> None:
        """Runs once per worker, whatever the number of tasks."""
        self.encoders = train()

    class Image(_Encoding):
        """The task ``image``. The preprocessor takes the pixels out of the nested image and leaves the rest behind."""

        backend_config: ClassVar[Mapping[str, Any]] = {
            "rename_fields": {"image.pixels": "pixels"},
            "feature_names": ["id", "label"],
        }

        def execute(self, inputs: list[Record]) -> Encoded:
            """One vector per image."""
            pixels = np.array([record["pixels"] for record in inputs], dtype=np.float64) / 16.0
            return Encoded(inputs, self.backend.encoders.encode_images(pixels))

    class Text(_Encoding):
        """The task ``text``."""

        backend_config: ClassVar[Mapping[str, Any]] = {"feature_names": ["id", "label", "text"]}

        def execute(self, inputs: list[Record]) -> Encoded:
            """One vector per text."""
            return Encoded(inputs, self.backend.encoders.encode_texts([record["text"] for record in inputs]))
