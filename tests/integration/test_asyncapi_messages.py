"""What the processor writes is what the AsyncAPI document of its settings says that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema_rs
import orjson
import pytest

from streamproc.asyncapi import asyncapi_document
from streamproc.settings import Settings
from streamproc.testing import MemoryRecord, Pipeline

ROOT = Path(__file__).resolve().parents[2]


def closed(schema: Any) -> Any:
    """Nothing that the schema does not name, save what is the user's, or has names of its own."""
    if isinstance(schema, dict):
        below = {key: closed(it) for key, it in schema.items()}
        return ({"additionalProperties": False} if schema.get("type") == "object" else {}) | below
    return schema


def schema_of(document: dict[str, Any], name: str) -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for(closed(document["components"]["schemas"][name]["schema"]))


def headers_of(record: MemoryRecord) -> dict[str, str]:
    return {name: (value or b"").decode() for name, value in record.headers}


@pytest.mark.parametrize("envelope", ["full", "result", "none"])
def test_results_dead_letters_and_metrics_match_the_schemas_of_the_document(envelope: str) -> None:
    settings = Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": "tests.support.backends:Scripted", "base_dir": str(ROOT), "version": "7"},
            "pool": {"restart_backoff_ms": 5},
            "topics_dir": "nowhere",
            "tasks": {
                "main": {
                    "input": {"topics": ["in"]},
                    "output": {"envelope": envelope},
                    "batch": {"length": "bytes", "max_size": 8},
                    "on_error": {"retries": 0},
                }
            },
        }
    )
    document = asyncapi_document(settings, {})
    records = [{"id": 0}, {"id": 1, "do": "raise"}, {"id": 2, "do": "refuse"}, b"{", {"id": 4}]
    topics = settings.topics_of("main")
    with Pipeline(settings) as pipeline:
        pipeline.process(records)
        results, letters, batches = [
            pipeline.broker.records(it) for it in (topics.results, topics.dead, topics.metrics)
        ]
    assert (len(results), len(letters)) == (2, 3)
    assert batches
    for result in results:
        if envelope == "full":
            schema_of(document, "result").validate(orjson.loads(result.value or b""))
        else:
            assert "result" not in document["components"]["schemas"]
        if envelope == "result":
            schema_of(document, "resultHeaders").validate(headers_of(result))
        else:
            assert not headers_of(result)
            assert "resultHeaders" not in document["components"]["schemas"]
    for letter in letters:
        schema_of(document, "deadLetterHeaders").validate(headers_of(letter))
    written = [orjson.loads(batch.value or b"") for batch in batches]
    for batch in written:
        schema_of(document, "batchMetrics").validate(batch)
    # Every field that the schema names is written by one batch or the other.
    assert set.union(*map(set, written)) == set(
        document["components"]["schemas"]["batchMetrics"]["schema"]["properties"]
    )
