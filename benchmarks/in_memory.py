"""The real processor with real worker processes over the in-memory broker: for what is measured without Kafka."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from streamproc.broker.memory import MemoryBroker
from streamproc.runtime.processor import Processor
from streamproc.runtime.startup import worker_setup
from streamproc.settings import Settings
from streamproc.testing.topics import create_topics

ROOT = Path(__file__).parents[1]


def settings_for(backend: str, tasks: dict[str, dict[str, Any]], **sections: Any) -> Settings:
    """An application whose tasks read topics of their own names."""
    return Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": backend, "base_dir": str(ROOT), **sections.pop("backend", {})},
            "topics_dir": "nowhere",
            "http": {"enabled": False},
            "tasks": {name: {"input": {"topics": [name]}, **task} for name, task in tasks.items()},
            **sections,
        }
    )


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[tuple[Processor, MemoryBroker]]:
    """The processor within the block: its workers are ready."""
    broker = MemoryBroker()
    await create_topics(settings, broker.admin())
    processor = Processor(settings, worker_setup(settings, {}), broker)
    try:
        await processor.start()
        await processor.until_ready()
        yield processor, broker
    finally:
        await processor.stop()


def check_results(broker: MemoryBroker, task: str, records: int) -> None:
    """Raise unless each record of a task, by its ``id`` from 0 on, has one result."""
    found = Counter(json.loads(it.value or b"{}")["result"]["id"] for it in broker.records(f"{task}.results"))
    if found != Counter(range(records)):
        raise SystemExit(f"task {task}: {records} records and {found.total()} results, {len(found)} of them distinct")
