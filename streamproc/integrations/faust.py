"""A backend as an agent of a Faust application: its records in our batches, our workers, our isolation of failures.

The agent of the application is the source and the sink of a processor like any other; ``faust_clients`` is what stands
between. The processor starts and stops with the application, and what ends it ends the application too: Faust's worker
exits with an error, and nothing that is not done is committed.

Invariants: the agent takes no event before the workers are ready; the application's configuration stays as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import faust
from faust.types import AgentT, TopicT
from faust.types.enums import ProcessingGuarantee
from mode import Service
from pydantic import ValidationError

from streamproc.errors import SettingsError
from streamproc.integrations.faust_clients import FaustConnections, FaustConsumer, FaustProducer
from streamproc.runtime.processor import Processor
from streamproc.runtime.startup import worker_setup
from streamproc.settings import Settings
from streamproc.settings_loading.explain import explained
from streamproc.settings_loading.source import Source

COMMIT_INTERVAL_MS = 100
"""Faust waits for acknowledgements when it stops and when partitions move."""
BATCHES_IN_FLIGHT = 8
"""For each worker, at most: Faust waits until all of them are done before it lets partitions go."""
RAW = "raw"


def inference_agent(
    app: faust.App,
    backend: str,
    source: TopicT,
    results: TopicT,
    *,
    dead_letters: TopicT | None = None,
    metrics: TopicT | None = None,
    name: str = "inference",
    config: Mapping[str, Any] | None = None,
    base_dir: Path | str = ".",
    max_size: int = 64,
    max_wait_ms: float = 20.0,
    workers: int = 1,
    task: Mapping[str, Any] | None = None,
    pool: Mapping[str, Any] | None = None,
) -> AgentT[Any]:
    """Run a backend over the records of a topic, in worker processes that start and stop with the application.

    Every record gets its result, or its dead letter, at least once: its event is acknowledged to Faust once that is
    acknowledged by Kafka. Records must come raw, and Faust's ``processing_guarantee`` must be ``at_least_once``.

    Args:
        app: The application; its configuration is not touched.
        backend: ``module:Name`` of a backend, as ``backend.path`` in ``streamproc.yaml``.
        source: The topic to read, made with ``value_serializer="raw"``.
        results: Where results go, with the keys of their records.
        dead_letters: Where records go that failed for good; without it they are logged, counted and dropped.
        metrics: Where a record for each batch goes, for ``streamproc stats``.
        name: The task's name in results and logs; agents of one application need names of their own.
        config: The backend's configuration.
        base_dir: The folder that the backend is in.
        max_size: The most records in a batch.
        max_wait_ms: How long the first record of a batch waits for others.
        workers: How many worker processes.
        task: What else a task says in ``streamproc.yaml``: ``on_error``, ``input.format``, ``output.envelope``, ...
        pool: What else its section ``pool`` says.

    Raises:
        SettingsError: an argument cannot be used.
    """
    settings = agent_settings(
        name,
        inputs=_topics_of(source),
        results=_topic_of(results),
        dead_letters=None if dead_letters is None else _topic_of(dead_letters),
        metrics=None if metrics is None else _topic_of(metrics),
        backend={"path": backend, "base_dir": base_dir, "config": dict(config or {})},
        batch={"max_size": max_size, "max_wait_ms": max_wait_ms},
        task=task or {},
        pool={**(pool or {}), "workers": workers},
    )
    topics = settings.topics_of(name)
    outputs = {topics.results: results, topics.metrics: metrics}
    if dead_letters is not None:
        outputs[topics.dead] = dead_letters
    consumer = FaustConsumer(app, topics.inputs, max_buffered=max_size)
    service = InferenceService(app, settings, consumer, FaustProducer(app, topics.inputs, outputs))

    async def assigned(*told: Any, **_: Any) -> None:
        await consumer.assigned(told[1])  # after who tells

    async def revoked(*_: Any, **__: Any) -> None:
        await consumer.revoked()

    async def feed(stream: Any) -> None:
        await service.ready.wait()
        async for event in stream.noack().events():
            await consumer.feed(event.message)

    app.on_partitions_assigned.connect(assigned)
    app.on_partitions_revoked.connect(revoked)
    app.service(cast("Any", service))  # a class by its type, and a service as well where they are started
    agent: AgentT[Any] = app.agent(source, name=f"streamproc.{name}")(feed)
    return agent


class InferenceService(Service):
    """The processor of an agent, from the application's start to its stop."""

    def __init__(self, app: faust.App, settings: Settings, consumer: FaustConsumer, producer: FaustProducer) -> None:
        super().__init__()
        self.ready = asyncio.Event()
        """Whether events are taken."""
        self.processor: Processor | None = None
        self._app = app
        self._settings = settings
        self._connections = FaustConnections(consumer, producer)

    async def on_start(self) -> None:
        """Start the workers and wait until they are ready. Raises StreamprocError, which ends the application."""
        guarantee: Any = self._app.conf.processing_guarantee
        if guarantee == ProcessingGuarantee.EXACTLY_ONCE:
            raise SettingsError(
                "an inference agent cannot be part of Faust's transactions",
                setting="processing_guarantee",
                hint="leave it at at_least_once; `streamproc run` has `delivery: exactly_once`",
            )
        self.processor = Processor(self._settings, worker_setup(self._settings, {}), self._connections)
        try:
            await self.processor.start()
            await self.processor.until_ready()
        except BaseException:
            await self.processor.stop()
            raise
        self.ready.set()

    async def on_stop(self) -> None:
        """Finish what is under way, acknowledge it, end the workers."""
        self.ready.clear()
        if self.processor is not None:
            await self.processor.stop()

    @Service.task
    async def _watch(self) -> None:
        """What ends the processor ends the application."""
        if self.processor is not None:
            await self.processor.wait()


def agent_settings(
    name: str,
    *,
    inputs: list[str],
    results: str,
    dead_letters: str | None,
    metrics: str | None,
    backend: Mapping[str, Any],
    batch: Mapping[str, Any],
    task: Mapping[str, Any],
    pool: Mapping[str, Any],
) -> Settings:
    """The settings of an agent's processor, as of a ``streamproc.yaml`` with one task.

    The arguments go before what ``task`` says of the same. There is no circuit: it would keep records, and Faust waits
    for them before it lets a partition go.

    Raises:
        SettingsError: something of it cannot be used.
    """
    in_flight = BATCHES_IN_FLIGHT * int(pool["workers"]) * int(batch["max_size"])
    on_error = {**task.get("on_error", {}), "circuit": {"enabled": False}}
    if dead_letters is None:
        on_error["then"] = "drop"
    data = {
        "name": name,
        "backend": backend,
        "pool": pool,
        "http": {"enabled": False},
        "tasks": {
            name: {
                "commit_interval_ms": COMMIT_INTERVAL_MS,
                "limits": {"max_in_flight_records": max(in_flight, 1)},
                **task,
                "delivery": "at_least_once",
                "input": {**task.get("input", {}), "topics": inputs},
                "output": {**task.get("output", {}), "topic": results},
                "metrics": {"topic": metrics},
                "dead_letters": {"topic": dead_letters},
                "batch": {**task.get("batch", {}), **batch},
                "on_error": on_error,
            }
        },
    }
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise explained(error.errors(include_url=False), Source(Path(), {}, lambda _: "inference_agent")) from None


def _topics_of(source: TopicT) -> list[str]:
    if not source.topics:
        raise SettingsError("source has no topic's name", place="inference_agent", hint="give it one, not a pattern")
    schema: Any = source.schema
    if schema.value_serializer != RAW:
        raise SettingsError(
            f"the values of topic {source.topics[0]} are decoded by Faust, and the workers decode them themselves",
            place="inference_agent",
            hint='make it with value_type=bytes and value_serializer="raw"',
        )
    return list(source.topics)


def _topic_of(output: TopicT) -> str:
    return str(output.get_topic_name())
