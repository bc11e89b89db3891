"""A first backend: how does a text feel? It counts words; a model would go in the same places."""

from typing import Any

from streamproc import InferenceBackend

Record = dict[str, Any]


class Backend(InferenceBackend):
    """Scores texts from -1 (bad) to 1 (good)."""

    def initialize(self) -> None:
        """Runs once per worker process, before its first batch: load your weights here."""
        self.good = {"good", "great", "happy", "love", "lovely", "nice", "thanks", "wonderful"}
        self.bad = {"awful", "bad", "broken", "hate", "late", "sad", "terrible", "wrong"}

    def execute(self, inputs: list[Record]) -> list[Record]:
        """Runs once per batch: one output per record, in the same order."""
        return [self.score(record["text"]) for record in inputs]

    def score(self, text: str) -> Record:
        """The answer to one text."""
        words = [word.strip(".,;:!?").lower() for word in text.split()]
        good = sum(word in self.good for word in words)
        bad = sum(word in self.bad for word in words)
        return {"text": text, "score": (good - bad) / max(good + bad, 1)}
