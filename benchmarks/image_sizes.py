"""A backend as an image model's: large records in, a small result out."""

from __future__ import annotations

from typing import Any

from streamproc import InferenceBackend


class Backend(InferenceBackend):
    """Tells of each record's image how long it is."""

    def execute(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A small result each."""
        return [{"id": record["id"], "size": len(record["image"])} for record in inputs]
