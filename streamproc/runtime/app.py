"""Runs a processor as a process: event loop, signals, sidecar, exit code.

``Application`` is a processor with its sidecar, for whoever has an event loop already (the demo, tests).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Self

import uvloop

from streamproc.broker.connections import KafkaConnections
from streamproc.broker.interface import Connections
from streamproc.observe.logs import configure_logging
from streamproc.runtime.batch_plan import batch_plans
from streamproc.runtime.processor import Processor
from streamproc.runtime.startup import declared_topics, http_token, task_inputs, warn_of_memory, worker_setup
from streamproc.settings import Settings

if TYPE_CHECKING:
    from streamproc.observe.server import Sidecar

log = logging.getLogger(__name__)


class Application:
    """A processor and its sidecar. Use it as a context manager, or call ``start`` and always ``stop``."""

    def __init__(self, settings: Settings, connections: Connections | None = None) -> None:
        warn_of_memory(settings)
        self._declared = declared_topics(settings)
        self._token = http_token(settings.http)
        self.processor = Processor(
            settings,
            worker_setup(settings, self._declared),
            connections or KafkaConnections(settings.kafka),
            plans=batch_plans(settings, os.environ),
        )
        self.sidecar: Sidecar | None = None
        """None until it is started, and where ``http.enabled`` is false."""

    async def start(self) -> None:
        """Launch the workers, bind the sidecar's port, then start the processor: probes are answered meanwhile."""
        await self.processor.launch()
        if self.processor.settings.http.enabled:
            self.sidecar = self._make_sidecar()
            await self.sidecar.start()
        await self.processor.start()

    def _make_sidecar(self) -> Sidecar:
        # FastAPI takes longer to import than all else that the start does. By now the workers do their share beside it.
        from streamproc.observe.http import create_app  # noqa: PLC0415 - as above
        from streamproc.observe.server import Sidecar  # noqa: PLC0415 - as above

        http = self.processor.settings.http
        inputs = task_inputs(self.processor.settings, self._declared) if http.predicts else None
        app = create_app(self.processor, self.processor.metrics, http, inputs=inputs, token=self._token)
        return Sidecar(app, http.host, http.port)

    async def stop(self) -> None:
        """Stop the processor, then the sidecar, which answers until the end."""
        try:
            await self.processor.stop()
        finally:
            if self.sidecar is not None:
                await self.sidecar.stop()

    async def __aenter__(self) -> Self:
        """Start; whatever had been started is stopped if that fails."""
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        await self.stop()


def run_app(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT, then drain and answer the exit code; a second signal exits at once.

    Raises:
        StreamprocError: what kept the processor from starting, or ended it.
    """
    configure_logging(sys.stderr, **settings.logging.model_dump())
    return uvloop.run(_run(settings))


async def _run(settings: Settings) -> int:
    application = Application(settings)
    processor = application.processor
    asked = asyncio.Event()
    asked_at: list[float] = []

    def on_signal(number: signal.Signals) -> None:
        if asked.is_set():
            processor.kill()
            sys.stderr.flush()
            os._exit(128 + number)
        log.info("%s: draining; once more to exit at once", number.name)
        asked_at.append(processor.clock())
        asked.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    stopping = loop.create_task(asked.wait())
    serving = loop.create_task(_serve(application))
    try:
        await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            # Interrupts a start that has not come to its end; a running processor drains in ``stop`` below.
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
        else:
            serving.result()
    finally:
        stopping.cancel()
        await application.stop()
    if asked_at:
        log.info("stopped in %.2f s", processor.clock() - asked_at[0])
    if processor.failure is not None:
        raise processor.failure
    return 0


async def _serve(application: Application) -> None:
    await application.start()
    await application.processor.until_ready()
    gc.collect()
    gc.freeze()
    log.info("ready")
    await application.processor.wait()
