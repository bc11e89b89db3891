"""The backend of the chaos suite: deterministic, and each answer says which record it is for."""

from __future__ import annotations

import time
from typing import Any

from streamproc import InferenceBackend, RecordError
from tests.chaos.records import SLOW_BATCH_S, Fate, answer_to, fate_of, is_slow


class Answering(InferenceBackend):
    """Answers by number; gives up what has to be given up."""

    def execute(self, inputs: list[dict[str, Any]]) -> list[Any]:
        """An answer per record."""
        if any(is_slow(record["partition"], record["number"]) for record in inputs):
            time.sleep(SLOW_BATCH_S)
        return [self._answer(record["partition"], record["number"]) for record in inputs]

    @staticmethod
    def _answer(partition: int, number: int) -> dict[str, int] | RecordError:
        if fate_of(number) == Fate.REFUSED:
            return RecordError(f"record {number} is refused")
        return {"partition": partition, "number": number, "answer": answer_to(partition, number)}
