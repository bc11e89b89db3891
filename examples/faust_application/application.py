"""A Faust application with a backend in worker processes of its own, beside an agent that reads what these found."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import faust
import orjson

from streamproc.integrations.faust import inference_agent

app = faust.App("languages", broker=os.environ.get("BROKER", "kafka://localhost:9092"))


def raw(name: str) -> Any:
    """A topic whose records come and go as bytes, since the workers decode and encode them; Faust makes it."""
    return app.topic(
        name,
        key_type=bytes,
        value_type=bytes,
        key_serializer="raw",
        value_serializer="raw",
        internal=True,
        partitions=2,
    )


texts, results, dead = raw("texts"), raw("texts.results"), raw("texts.dead")

inference_agent(
    app,
    "inference:Backend",
    texts,
    results,
    dead_letters=dead,
    base_dir=Path(__file__).parent,
    max_size=64,
    max_wait_ms=20,
    workers=2,
)

seen: Counter[str | None] = Counter()


@app.agent(results)
async def count(stream: Any) -> None:
    """Count the languages."""
    async for value in stream:
        seen[orjson.loads(value)["result"]["language"]] += 1
        print(dict(seen), flush=True)


if __name__ == "__main__":
    app.main()
