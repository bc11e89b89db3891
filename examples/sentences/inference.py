"""Sentences to vectors, with the real weights of all-MiniLM-L6-v2.

    {"id": "3", "text": "Return the larger of two numbers."}  ─►  {"id": "3", "vector": [384 numbers]}

``Backend`` has one task; ``Search`` has two on the same weights: ``passage`` encodes what is to be found and remembers
it by its title, ``query`` finds the passages that are nearest to a question.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from encoder import Encoder, load_tokenizer, model_folder  # type: ignore[import-not-found]  # the file beside this one

from streamproc import BackendConfig, InferenceBackend, MultiTaskBackend, Task

Record = dict[str, Any]


class Config(BackendConfig):
    """What ``backend.config`` may say."""

    max_tokens: int = 256
    """Of longer texts the rest is passed over; the model was trained on texts of so many tokens."""
    decimals: int = 5
    """Of the vectors' numbers: fewer make smaller results."""


class Backend(InferenceBackend):
    """One task: a vector for each text."""

    backend_config_model = Config
    config: Config

    def initialize(self) -> None:
        """Runs once per worker."""
        self.encoder = Encoder(model_folder(), self.tokenizer)

    @cached_property
    def tokenizer(self) -> Any:
        """Loaded when it is needed first: ``length`` is called in a process that needs no weights."""
        return load_tokenizer(model_folder(), self.config.max_tokens)

    def length(self, record: Record) -> int:
        """What the model pads: the text's tokens. Asked for where ``batch.length`` is ``backend``."""
        return len(self.tokenizer.encode(record["text"]).ids)

    def execute(self, inputs: list[Record]) -> list[Record]:
        """Every text is padded to the longest of the batch."""
        vectors = self.encoder.encode([record["text"] for record in inputs])
        rows = vectors.round(self.config.decimals).tolist()
        return [{"id": record.get("id"), "vector": row} for record, row in zip(inputs, rows, strict=True)]


class SearchConfig(Config):
    """What ``backend.config`` may say of ``Search``."""

    remembered: int = 2_000
    """Passages that a worker knows, the latest ones."""
    nearest: int = 3
    """Passages in the answer to a query."""


class Search(MultiTaskBackend):
    """Two tasks, one set of weights. Each worker finds among the passages that it has encoded itself."""

    backend_config_model = SearchConfig
    config: SearchConfig

    def initialize(self) -> None:
        """Runs once per worker, whatever the number of tasks."""
        self.encoder = Encoder(model_folder(), load_tokenizer(model_folder(), self.config.max_tokens))
        self.passages: OrderedDict[str, np.ndarray[Any, Any]] = OrderedDict()

    class Passage(Task["Search"]):
        """The task ``passage``: long texts, many of them; nobody waits."""

        backend_config_model = SearchConfig
        config: SearchConfig
        backend_config: ClassVar[Mapping[str, Any]] = {"feature_names": ["id", "title", "text"]}

        def execute(self, inputs: list[Record]) -> list[Record]:
            """A vector for each passage, which is remembered."""
            vectors = self.backend.encoder.encode([f"{record['title']}. {record['text']}" for record in inputs])
            known = self.backend.passages
            for record, vector in zip(inputs, vectors, strict=True):
                known[record["title"]] = vector
                known.move_to_end(record["title"])
            while len(known) > self.config.remembered:
                known.popitem(last=False)
            rows = vectors.round(self.config.decimals).tolist()
            return [
                {"id": record["id"], "title": record["title"], "vector": row}
                for record, row in zip(inputs, rows, strict=True)
            ]

    class Query(Task["Search"]):
        """The task ``query``: short texts; somebody waits for the answer."""

        backend_config_model = SearchConfig
        config: SearchConfig
        backend_config: ClassVar[Mapping[str, Any]] = {"feature_names": ["id", "text"]}

        def execute(self, inputs: list[Record]) -> list[Record]:
            """The passages that are nearest to each query, the nearest first."""
            vectors = self.backend.encoder.encode([record["text"] for record in inputs])
            titles = list(self.backend.passages)
            known = np.stack(list(self.backend.passages.values())) if titles else np.zeros((0, vectors.shape[1]))
            similarities = vectors @ known.T
            order = np.argsort(-similarities, axis=1)[:, : self.config.nearest]
            return [
                {
                    "id": record["id"],
                    "nearest": [
                        {"title": titles[at], "similarity": round(float(similarities[row, at]), 3)} for at in found
                    ],
                }
                for row, (record, found) in enumerate(zip(inputs, order.tolist(), strict=True))
            ]
