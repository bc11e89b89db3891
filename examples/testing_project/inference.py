"""How does a text feel? It counts words; a model would go in the same places."""

from typing import Any

from streamproc import BackendConfig, InferenceBackend, RecordError

Record = dict[str, Any]


class Config(BackendConfig):
    """What `backend.config` in streamproc.yaml may say."""

    decimals: int = 3


class Backend(InferenceBackend):
    """Scores texts from -1 (bad) to 1 (good)."""

    backend_config_model = Config
    config: Config

    def initialize(self) -> None:
        """Runs once per worker process, before its first batch: load your weights here."""
        self.good = {"good", "great", "happy", "love", "lovely", "nice", "thanks", "wonderful"}
        self.bad = {"awful", "bad", "broken", "hate", "late", "sad", "terrible", "wrong"}

    def execute(self, inputs: list[Record]) -> list[Record | RecordError]:
        """Runs once per batch: one output per record, in the same order."""
        return [self.score(record["text"]) for record in inputs]

    def score(self, text: str) -> Record | RecordError:
        """The answer to one text."""
        words = [word.strip(".,;:!?").lower() for word in text.split()]
        if not words:
            return RecordError("there are no words in it")
        score = sum((word in self.good) - (word in self.bad) for word in words) / len(words)
        return {"text": text, "score": round(score, self.config.decimals)}
