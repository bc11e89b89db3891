"""A backend for a Faust application: which language is a text in? A model would go in the same places."""

from typing import Any

from streamproc import InferenceBackend, RecordError

Record = dict[str, Any]


class Backend(InferenceBackend):
    """Tells English from German by small words."""

    def initialize(self) -> None:
        """Runs once per worker process, before its first batch: load your weights here."""
        self.words = {
            "en": {"the", "and", "is", "of", "to", "in", "it", "was"},
            "de": {"der", "die", "das", "und", "ist", "zu", "es", "war"},
        }

    def execute(self, inputs: list[Record]) -> list[Any]:
        """Runs once per batch: one output per record, in the same order; a text without words is no text."""
        return [self.language_of(it["text"]) if it["text"].strip() else RecordError("no words") for it in inputs]

    def language_of(self, text: str) -> Record:
        """The language with the most small words in a text."""
        found = text.lower().split()
        counts = {language: sum(it in words for it in found) for language, words in self.words.items()}
        return {"text": text, "language": max(counts, key=lambda it: counts[it]) if any(counts.values()) else None}
