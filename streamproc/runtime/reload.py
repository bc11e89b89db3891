"""Hot reload: another version of backend, settings and schemas, without a rebalance, or a reason why not.

    settings and topics are read ─► what may not change has not ─► new processes are ready ─► all switch at once
               │                              │                            │
               └──────────────────────────────┴────────────────────────────┴─► refused: everything goes on as before

All new workers stand ready before the first of them gets a batch. So a version is in force or it is not, at any moment
and for all tasks, and a version that does not come up has changed nothing; for that, both are in memory for a while.
What runs is finished by the workers that have it. The consumers, producers and groups know nothing of it.

Invariant: one reload at a time. Files are read in a thread, since the event loop has no time for that.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from streamproc.broker.declared_topics import DeclaredTopic
from streamproc.errors import InternalError, ReloadBusyError, ReloadRefusedError, StreamprocError
from streamproc.observe.status import ReloadStatus
from streamproc.runtime.batch_plan import BatchPlan, batch_plans
from streamproc.runtime.processor import Processor
from streamproc.runtime.startup import declared_topics, worker_setup
from streamproc.settings import Settings

_MAY_CHANGE = {
    *("backend", "pool", "batch", "topics_dir", "estimates_dir", "logging", "rebalance_drain_s", "shutdown_timeout_s"),
    "tasks.*.input.max_value_bytes",
    *(f"tasks.*.batch.{name}" for name in ("max_size", "max_wait_ms", "max_bytes", "max_padded", "memory_budget_mb")),
    *(f"tasks.*.batch.{name}" for name in ("oversized", "target_latency_ms", "target_margin_ms")),
    *("tasks.*.on_error", "tasks.*.limits", "tasks.*.commit_interval_ms"),
}
"""The settings, whole sections among them, that a reload brings into force. What is not among them is fixed."""

Load = Callable[[], Settings]
"""Reads the settings again. Raises StreamprocError."""

log = logging.getLogger(__name__)


class Reloader:
    """The reloads of one processor.

    Args:
        processor: What to reload.
        load: Reads its settings.
        wall_clock: Seconds since 1970.
        on_taken: Is told of the settings and the declared topics that came into force.
    """

    def __init__(
        self,
        processor: Processor,
        load: Load,
        wall_clock: Callable[[], float],
        on_taken: Callable[[Settings, dict[str, DeclaredTopic]], None],
    ) -> None:
        self._processor = processor
        self._load = load
        self._wall_clock = wall_clock
        self._on_taken = on_taken
        self._lock = asyncio.Lock()

    async def reload(self, *, wait: bool = False) -> ReloadStatus:
        """Bring what the files say now into force, in workers that are ready for it.

        Args:
            wait: For another reload to end first, rather than be refused for it.

        Raises:
            ReloadBusyError: another reload is under way, or the processor is starting or stopping.
            ReloadRefusedError: this version is not taken; the one before goes on.
        """
        # In a task of its own: who asked for it may go, and it goes on.
        reloading = asyncio.ensure_future(self._one_at_a_time(wait=wait))
        reloading.add_done_callback(lambda it: it.cancelled() or it.exception())
        return await asyncio.shield(reloading)

    async def _one_at_a_time(self, *, wait: bool) -> ReloadStatus:
        if self._lock.locked() and not wait:
            raise ReloadBusyError("another reload is under way; how it ends is in the log and in /status")
        async with self._lock:
            return await self._reload()

    async def _reload(self) -> ReloadStatus:
        processor = self._processor
        if (busy := processor.too_busy_to_reload) is not None:
            raise ReloadBusyError(busy)
        begun = processor.clock()
        processor.reloading = True
        log.info("reload: reading settings and topics")
        try:
            settings, declared, setup, plans = await asyncio.to_thread(self._read)
            _check_changes(processor.settings, settings)
            log.info("reload: starting %d new workers beside those that work", settings.pool.workers)
            await processor.reload(settings, setup, plans)
        except Exception as error:
            reason = str(error if isinstance(error, StreamprocError) else InternalError(error, where="a reload"))
            self._ended(begun, reason)
            raise ReloadRefusedError(reason) from error
        finally:
            processor.reloading = False
        self._on_taken(settings, declared)
        return self._ended(begun, None)

    def _read(self) -> tuple[Settings, dict[str, DeclaredTopic], dict[str, Any], dict[str, BatchPlan]]:
        settings = self._load()
        declared = declared_topics(settings)
        return settings, declared, worker_setup(settings, declared), batch_plans(settings, os.environ)

    def _ended(self, begun: float, reason: str | None) -> ReloadStatus:
        processor = self._processor
        status = ReloadStatus(
            outcome="taken" if reason is None else "refused",
            reason=reason,
            ended_at=datetime.fromtimestamp(self._wall_clock(), UTC),
            took_s=round(processor.clock() - begun, 3),
            generation=processor.pool.generation,
            backend_version=processor.settings.backend.version,
        )
        processor.last_reload = status
        processor.metrics.reloaded(status.outcome)
        version = f"backend version {status.backend_version or '(none)'}, generation {status.generation}"
        if reason is None:
            log.info("reload: %s in force after %.2f s", version, status.took_s)
        else:
            log.error("reload: refused after %.2f s, %s stays in force: %s", status.took_s, version, reason)
        return status


def _check_changes(before: Settings, after: Settings) -> None:
    if (fixed := next(fixed_changes(before, after), None)) is not None:
        raise ReloadRefusedError(f"{fixed} has changed, which needs a restart; put it back, or restart the processor")


def fixed_changes(before: Settings, after: Settings) -> Iterator[str]:
    """The settings that differ and that a reload cannot change, by their dotted names."""
    return _changes(before, after, (), ())


def _changes(before: Any, after: Any, name: tuple[str, ...], pattern: tuple[str, ...]) -> Iterator[str]:
    if before == after or ".".join(pattern) in _MAY_CHANGE:
        return
    if isinstance(before, BaseModel) and isinstance(after, BaseModel):
        for field in type(before).model_fields:
            if isinstance(before, Settings) and field not in Settings.model_fields:
                continue  # of a class of the user's own, for the backend
            parts = getattr(before, field), getattr(after, field)
            yield from _changes(*parts, (*name, field), (*pattern, field))
    elif isinstance(before, dict) and before.keys() == after.keys():
        for key in before:
            yield from _changes(before[key], after[key], (*name, key), (*pattern, "*"))
    elif isinstance(before, dict):
        yield from (".".join((*name, key)) for key in sorted(before.keys() ^ after.keys()))
    else:
        yield ".".join(name)
